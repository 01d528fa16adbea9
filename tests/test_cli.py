"""The command line: its output, its log and its exit codes."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import foretaste as ft

RECIPE = """
[data]
kind = "files"
files = ["events.csv"]
user = "who"
item = "what"
timestamp = "at"
items = "films.csv"
[split]
kind = "leave_last"
[model]
kind = "sasrec"
embedding_dim = 8
num_blocks = 1
num_heads = 1
max_len = 10
[training]
epochs = 2
device = "cpu"
[evaluation]
k = [3]
[published]
ndcg_at_3 = 0.5
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of events, one of items, and a recipe over both."""
    folder = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    rows = [
        f"u{user},{item},{1_600_000_000 + place}"
        for user in range(30)
        for place, item in enumerate(draw.choice(20, size=8, replace=False).tolist())
    ]
    (folder / "events.csv").write_text("who,what,at\n" + "\n".join(rows))
    (folder / "films.csv").write_text(
        "what,title\n" + "\n".join(f"{item},The {item}th film" for item in range(20))
    )
    (folder / "run.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def bundle(world: Path) -> Path:
    folder = world / "bundle"
    config = ft.read_experiment(world / "run.toml")
    found = ft.run_experiment(config, ft.read_split(config, data_dir=world))
    ft.to_recommender(*found.final).save(folder)
    return folder


def test_a_table_becomes_a_store_that_the_audit_reads(
    foretaste: Run, world: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    columns = ("--user", "who", "--item", "what", "--timestamp", "at")
    code, out, _ = foretaste(
        "data", "import", world / "events.csv", *columns, "--out", store, "--json"
    )
    assert code == 0
    # 30 users with 8 events each.
    assert (json.loads(out)["events"], json.loads(out)["users"]) == (240, 30)
    code, out, _ = foretaste("data", "audit", store, "--json")
    assert code == 0
    assert json.loads(out)["store"] == str(store)
    (world / "twice.csv").write_text("user_id,item_id\na,x\na,x\n")
    code, out, _ = foretaste("data", "import", world / "twice.csv", "--out", tmp_path / "twice")
    assert (code, "· 1 events repeat the user and item of another: kept" in out) == (0, True)
    assert "[" not in out  # a list of nothing, as Python writes it


def test_a_schema_is_proposed_for_files_and_for_a_store_as_a_recipe_takes_it(
    foretaste: Run, world: Path, tmp_path: Path
) -> None:
    lines = [f"{n},{'new' if n % 3 else 'old'},2024-01-{1 + n:02}" for n in range(20)]
    (tmp_path / "items.csv").write_text("what,state,since\n" + "\n".join(lines))
    columns = ("--user", "who", "--item", "what", "--items", tmp_path / "items.csv")
    code, out, _ = foretaste("data", "schema", world / "events.csv", *columns)
    assert code == 0
    found = ft.schema_from_toml(out)
    assert found.item["state"].kind == "categorical"
    assert found.item["since"].why == "times"
    store = tmp_path / "store"
    foretaste("data", "import", world / "events.csv", *columns, "--out", store)
    assert foretaste("data", "schema", store)[1] == out
    assert json.loads(foretaste("data", "schema", store, "--json")[1])["item"]["since"]
    (tmp_path / "features.toml").write_text(out)
    (tmp_path / "run.toml").write_text(f'features = "features.toml"\n{RECIPE}')
    assert ft.read_experiment(tmp_path / "run.toml").features == found


def test_labels_and_a_context_are_imported_and_audited(foretaste: Run, tmp_path: Path) -> None:
    lines = [f"{n % 5},{int(n % 3 == 0)},{'paid' if n % 3 == 0 else 'free'}" for n in range(60)]
    (tmp_path / "people.csv").write_text("hour,bought,after\n" + "\n".join(lines))
    store = tmp_path / "store"
    named = ("--no-users", "--no-items", "--column", "bought")
    told = ("--context", "hour", "--context", "after", "--out", store, "--json")
    code, out, _ = foretaste("data", "import", tmp_path / "people.csv", *named, *told)
    assert code == 0
    summary = json.loads(out)
    assert (summary["events"], summary["users"], summary["items"]) == (60, 60, 1)
    assert (summary["columns"], summary["context"]) == (["bought"], ["hour", "after"])
    code, out, _ = foretaste("data", "audit", store, "--label", "bought", "--json")
    assert code == 0
    assert [f["what"] for f in json.loads(out)["findings"] if f["severity"] == "leak"] == [
        "column_tells_label"
    ]
    code, _, err = foretaste("data", "audit", store, "--label", "buys")
    assert (code, "no column 'buys'" in err) == (1, True)


def test_a_recipe_becomes_a_bundle_with_its_report_and_its_record(
    foretaste: Run, world: Path, tmp_path: Path
) -> None:
    out_folder, record = tmp_path / "bundle", tmp_path / "results" / "run.json"
    code, out, err = foretaste(
        "fit",
        world / "run.toml",
        "--out",
        out_folder,
        "--data-dir",
        world,
        "--json",
        "--set",
        "training.epochs=1",
        "--set",
        "final=validation",
        "--result",
        record,
    )
    assert (code, "wrote" in err) == (0, True)
    assert set(json.loads(out)["metrics"]) >= {"ndcg_at_3", "hit_rate_at_3"}
    written = json.loads(record.read_text())
    assert written["published"] == {"ndcg_at_3": 0.5}
    assert written["command"].endswith("--set training.epochs=1 --set final=validation")
    assert str(world) not in record.read_text()
    assert set(written) >= {
        "recipe",
        "command",
        "date",
        "commit",
        "seed",
        "threads",
        "machine",
        "versions",
        "train_seconds",
        "metrics",
        "intervals",
        "notes",
        "refitted",
    }
    code, out, _ = foretaste("inspect", out_folder, "--json")
    assert (code, json.loads(out)["manifest"]["model"]["kind"]) == (0, "sasrec")


def test_a_bundle_measured_again_gives_the_figures_it_was_written_with(
    foretaste: Run, world: Path, bundle: Path
) -> None:
    code, out, _ = foretaste("evaluate", bundle, "--data-dir", world, "--json")
    stored = json.loads((bundle / "report.json").read_text())["metrics"]
    assert (code, json.loads(out)["metrics"]) == (0, stored)
    code, out, _ = foretaste("evaluate", bundle, "--data-dir", world)
    assert code == 0
    leading = next(value for name, value in stored.items() if name.startswith("ndcg_at"))
    assert f"{leading:.4f} [" in out
    assert "Report(" not in out


def test_rules_narrow_what_is_recommended(foretaste: Run, bundle: Path, world: Path) -> None:
    titles = [f"The {item}th film" for item in (3, 5, 8)]
    rule = f"where.title.one_of={json.dumps(titles)}"
    code, out, _ = foretaste("recommend", bundle, "--rule", rule, "-k", "9", "--seen", "--json")
    answer = json.loads(out)
    assert code == 0
    assert {row["attributes"]["title"] for row in answer["rows"]} == set(titles)
    assert "9 items were requested, but only 3 are allowed" in answer["notes"]
    code, out, _ = foretaste("recommend", bundle, "--rule", "diversity.relevance=0.2", "--json")
    assert (code, len(json.loads(out)["rows"])) == (0, 10)
    (world / "one.txt").write_text("u1\n")
    lists = world / "ruled.parquet"
    words = ("--users", world / "one.txt", "--out", lists, "--seen", "--rule", rule)
    assert foretaste("recommend", bundle, *words)[0] == 0
    assert sorted(pl.read_parquet(lists)["item_id"][0].to_list()) == [3, 5, 8]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("where.titel.equals=A", "did you mean 'title'"),
        ("where.title.equal=A", "did you mean equals"),
        ("caps.title=0", "caps.title"),
        ("caps", "write it as section.name=value"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_said_in_one_line(
    foretaste: Run, bundle: Path, rule: str, says: str
) -> None:
    code, out, err = foretaste("recommend", bundle, "--rule", rule)
    assert (code, out) == (1, "")
    assert says in err


def test_recommendations_say_where_they_came_from(foretaste: Run, bundle: Path) -> None:
    for words, source in (
        (["--user", "u3"], "model"),
        (["--history", "1, 2,3"], "fold-in"),
        (["--user", "nobody"], "popular"),
    ):
        code, out, _ = foretaste("recommend", bundle, *words, "-k", "4", "--json")
        rows = json.loads(out)["rows"]
        assert (code, len(rows)) == (0, 4)
        assert {row["source"] for row in rows} == {source}


def test_for_people_an_answer_shows_titles(foretaste: Run, bundle: Path) -> None:
    code, out, _ = foretaste("similar", bundle, "--item", "7", "-k", "3")
    assert code == 0
    assert out.count("th film") == 3


def test_a_file_of_users_becomes_a_parquet_of_lists(
    foretaste: Run, bundle: Path, tmp_path: Path
) -> None:
    users, lists = tmp_path / "users.txt", tmp_path / "lists.parquet"
    users.write_text("u1\nu2\n\nnobody\n")
    code, out, _ = foretaste(
        "recommend", bundle, "--users", users, "--out", lists, "-k", "5", "--json"
    )
    assert (code, json.loads(out)) == (
        0,
        {"users": 3, "unknown": 1, "missing": 1, "notes": []},
    )
    table = pl.read_parquet(lists)
    assert table["user_id"].to_list() == ["u1", "u2", "nobody"]
    assert table["source"].to_list() == ["model", "model", "popular"]
    assert [len(items) for items in table["item_id"].to_list()] == [5, 5, 5]


@pytest.mark.parametrize(
    "words",
    [
        ["data", "import", "missing.csv", "--out", "store"],
        ["data", "get", "no-such-data"],
        ["data", "audit", "missing"],
        ["fit", "missing.toml", "--out", "bundle"],
        ["evaluate", "missing"],
        ["tune", "missing.toml"],
        ["recommend", "missing", "--user", "1"],
        ["similar", "missing", "--item", "1"],
        ["inspect", "missing"],
        ["serve", "missing", "--port", "0"],
        ["serve", "missing", "--set", "max_kk=3"],
    ],
    ids=" ".join,
)
def test_work_that_fails_ends_with_one_line_and_exit_code_1(
    foretaste: Run, words: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = foretaste(*words)
    assert (code, out) == (1, "")
    assert err.startswith("foretaste: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["fit"],
        ["fit", "run.toml"],
        ["recommend", "bundle", "-k", "0"],
        ["recommend", "bundle", "--users", "a.txt"],
        ["recommend", "bundle", "--users", "a.txt", "--out", "b", "--user", "1"],
        ["serve", "bundle", "--port", "70000"],
        ["data", "import", "a.csv", "--out", "b", "--timestamp-unit", "weeks"],
        ["fit", "run.toml", "--out", "b", "--track", "paper"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_ends_with_exit_code_2(foretaste: Run, words: Sequence[str]) -> None:
    code, out, err = foretaste(*words)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_an_override_that_slips_names_the_setting(foretaste: Run, world: Path) -> None:
    code, _, err = foretaste(
        "fit", world / "run.toml", "--out", world / "x", "--set", "model.droput=0.1"
    )
    assert code == 1
    assert "model.droput: there is no such setting; did you mean dropout?" in err


def test_help_and_version_are_answered_before_torch_is_loaded() -> None:
    script = (
        "import sys\n"
        "from foretaste.cli.main import run\n"
        "try:\n    run(['--version'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'polars', 'faiss', 'fastapi'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"foretaste {ft.__version__}\n"


@pytest.mark.parametrize(("given", "then"), [(None, "100000"), ("5", "5")])
def test_waiting_threads_spin_shortly_by_default(
    foretaste: Run, monkeypatch: pytest.MonkeyPatch, given: str | None, then: str
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    foretaste("--version")
    assert os.environ["GOMP_SPINCOUNT"] == then


@pytest.mark.parametrize(
    ("text", "users"),
    [
        ("order;who\n1001;u1\n1002;u2\n1003;u1\n", ["u1", "u2"]),
        ("order_no,customer\nA1,u1\nA2,u2\n", ["u1", "u2"]),
        ("u1,12\nu2,13\nu1,14\n", ["u1", "u2"]),
        ("user_id,n\nnew,1\n", ["new"]),
    ],
)
def test_the_users_of_a_table_are_in_the_column_that_holds_known_ones(
    foretaste: Run, bundle: Path, tmp_path: Path, text: str, users: list[str]
) -> None:
    table, out = tmp_path / "orders.csv", tmp_path / "lists.jsonl"
    table.write_text(text)
    code, shown, _ = foretaste("recommend", bundle, "--users", table, "--out", out, "-k", "1")
    found = [json.loads(line)["user_id"] for line in out.read_text().splitlines()]
    assert (code, found) == (0, users)
    assert ("rows repeat a user" in shown) == (text.count("u1") > 1)


def test_a_table_without_a_known_user_is_refused_with_the_name_that_helps(
    foretaste: Run, bundle: Path, tmp_path: Path
) -> None:
    table, out = tmp_path / "orders.csv", tmp_path / "lists.jsonl"
    table.write_text("a,b\nx,y\nz,w\n")
    code, _, err = foretaste("recommend", bundle, "--users", table, "--out", out)
    assert code == 1
    assert "name the column of user ids 'user_id'" in err
    table.write_text("user_id,b\nx,y\nz,w\n")
    assert foretaste("recommend", bundle, "--users", table, "--out", out)[0] == 0


def test_a_token_is_shown_once_and_an_empty_or_missing_one_does_not_serve(
    foretaste: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokens.toml"
    code, out, err = foretaste("token", file, "shop", "--role", "read", "--role", "write")
    assert (code, err) == (0, "")
    assert 'roles = ["read", "write"]' in file.read_text().replace("'", '"')
    assert out.strip() not in file.read_text()
    code, out, err = foretaste("token", file, "shop", "--json")
    assert (code, out) == (1, "")
    assert "choose another" in err
    code, out, _ = foretaste("token", file, "cron", "--json")
    assert (code, json.loads(out)["name"]) == (0, "cron")
    code, _, err = foretaste("serve", "nowhere", "--host", "0.0.0.0")
    assert (code, "without a token" in err) == (1, True)
    for words in (("--token", ""), ()):
        monkeypatch.setenv("FORETASTE_TOKEN", "")
        code, _, err = foretaste("serve", "nowhere", *words)
        assert (code, "token: is empty" in err) == (1, True)
    monkeypatch.setenv("FORETASTE_TOKEN", "secret")
    code, _, err = foretaste("serve", "nowhere", "--host", "0.0.0.0")
    assert (code, "give the folder of a bundle" in err, "secret" in err) == (1, True, False)


def test_a_server_that_was_stopped_ends_without_a_last_collection_of_its_memory(
    foretaste: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.serve", lambda *_, **__: None)
    assert foretaste("serve", "bundle")[0] == 0
    assert gc.get_freeze_count() > 0  # these objects are left to the end of the process
    gc.unfreeze()
