"""Output of commands: complete ids that can be used as input, on any stream, and as JSON."""

import datetime as dt
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pytest

import foretaste as ft
from foretaste.cli.main import run
from foretaste.cli.show import answer, one_line, pairs, table
from foretaste.shown import json_value

LONG = "SKU/0001-ÄÖ-" + "long-" * 30 + "end"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with ids and titles that are long, wide, or look like something else."""
    items = [LONG, "a,b", "[rec]", "[/x]", ":smile:", "two\nlines", "123460", "映画"]
    rows = [(n // 3, items[(n % 3 + n // 3) % 8]) for n in range(60)]
    events = ft.read_interactions(
        pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row"),
        items=pl.DataFrame(
            {
                "item_id": items,
                "Item_Title": [f"The film {n}" for n in range(8)],
                "price": [float("nan"), 1.5, None, float("inf"), 1.0, 2.0, 3.0, 4.0],
                "day": [dt.date(2024, 1, 1)] * 8,
            }
        ),
    )
    trained = ft.fit(ft.PopularityConfig(), ft.leave_last_split(events), show=False)
    folder = tmp_path_factory.mktemp("odd") / "bundle"
    ft.build_recommender(trained).save(folder)
    return folder


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: bytes
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def foretaste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command whose standard output is a file of an encoding, or the given descriptor."""

    def call(*words: object, encoding: str = "utf-8", descriptor: int | None = None) -> Ended:
        err = io.StringIO()
        opened = tmp_path / "out" if descriptor is None else descriptor
        with (
            io.TextIOWrapper(open(opened, "wb"), encoding=encoding) as out,
            monkeypatch.context() as patched,
        ):
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                run([str(word) for word in words])
        written = b"" if descriptor is not None else (tmp_path / "out").read_bytes()
        return Ended(int(ended.value.code or 0), written, err.getvalue())

    return call


def test_in_a_pipe_ids_and_titles_are_whole(
    foretaste: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = foretaste("recommend", bundle, "-k", "8").out.decode()
    for whole in (LONG, "a,b", "[rec]", "[/x]", ":smile:", r"two\nlines", "123460", "映画"):
        assert f" {whole} " in shown
    assert shown.count("The film") == 8


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "shift-jis"])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["people", "json"])
def test_any_encoding_of_the_stream_is_written(
    foretaste: Run, bundle: Path, encoding: str, form: list[str]
) -> None:
    done = foretaste("recommend", bundle, "-k", "8", *form, encoding=encoding)
    shown = done.out.decode(encoding)
    assert (done.code, done.err, "123460" in shown) == (0, "", True)
    if form:
        assert {row["item_id"] for row in json.loads(shown)["rows"]} >= {LONG, "映画"}


@pytest.mark.parametrize("words", [["--version"], ["recommend"], ["recommend", "--json"]])
def test_a_full_output_is_one_line_and_exit_code_1(
    foretaste: Run, bundle: Path, words: list[str]
) -> None:
    asked = words if words[0] == "--version" else [words[0], bundle, *words[1:]]
    done = foretaste(*asked, descriptor=os.open("/dev/full", os.O_WRONLY))
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "No space left on device" in done.err


@pytest.mark.parametrize("words", [["--version"], ["recommend"], ["recommend", "--json"]])
def test_a_reader_that_has_enough_ends_a_command_quietly(
    foretaste: Run, bundle: Path, words: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    asked = words if words[0] == "--version" else [words[0], bundle, *words[1:]]
    done = foretaste(*asked, descriptor=writer)
    assert (done.code, done.err) == (141, "")


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["--history", "a,b"], []),
        (["--history", "[rec], :smile:"], []),
        (["--history", "a,b", "--history", "[rec]"], []),
        (["--history", "a,b", "--history", "nothing"], ["nothing"]),
        (["--history", ""], []),
        (["--history", " , "], []),
    ],
)
def test_a_history_is_given_between_commas_or_several_times(
    foretaste: Run, bundle: Path, words: list[str], unknown: list[str]
) -> None:
    done = foretaste("recommend", bundle, *words, "--json")
    assert (done.code, json.loads(done.out)["unknown_items"]) == (0, unknown)


def test_values_that_json_has_not_are_null_or_text(foretaste: Run, bundle: Path) -> None:
    rows = json.loads(foretaste("recommend", bundle, "-k", "8", "--json").out)["rows"]
    prices = [row["attributes"]["price"] for row in rows]
    assert sorted(prices, key=str) == [1.0, 1.5, 2.0, 3.0, 4.0, None, None, None]
    assert rows[0]["attributes"]["day"] == "2024-01-01"


def test_a_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "foretaste", "--version"], capture_output=True, check=True
    )
    assert done.stdout.decode() == f"foretaste {ft.__version__}\n"


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (float("nan"), None),
        (float("-inf"), None),
        (np.float32("nan"), None),
        (np.float32(0.5), 0.5),
        (np.int64(2**60), 2**60),
        (np.bool_(True), True),  # noqa: FBT003
        (np.array([[1.0, np.nan]]), [[1.0, None]]),
        (np.datetime64("2024-01-01T10:00"), "2024-01-01T10:00"),
        (np.datetime64("NaT"), None),
        (Decimal("10.5"), 10.5),
        (Decimal("NaN"), None),
        (b"caf\xc3\xa9", "café"),
        (b"\xff", "\\xff"),
        (dt.datetime(2024, 1, 1, 12, tzinfo=dt.UTC), "2024-01-01T12:00:00+00:00"),
        (dt.date(2024, 1, 1), "2024-01-01"),
        (dt.time(9, 30), "09:30:00"),
        (dt.timedelta(minutes=2), 120.0),
        (pd.Timestamp("2024-01-01"), "2024-01-01T00:00:00"),
        (pd.NaT, None),
        (pd.NA, None),
        (pd.Series([1, 2]), [1, 2]),
        (pl.Series([1.0, None]), [1.0, None]),
        ({1: (2, {3})}, {"1": [2, [3]]}),
        (Path("a/b"), "a/b"),
        (ft.TrainingConfig(epochs=3), ft.TrainingConfig(epochs=3).model_dump(mode="json")),
    ],
)
def test_json_holds_every_value(value: object, held: object) -> None:
    assert json_value(value) == held
    json.dumps(json_value(value), allow_nan=False)


def test_numbers_are_shown_as_they_can_be_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    answer({}, table("", ("item", "n"), [(1234567, 7)]), pairs("", {"seed": 123460}), as_json=False)
    shown = capsys.readouterr().out
    assert "1234567" in shown
    assert "123460" in shown
    assert "," not in shown


def test_control_characters_are_written_out() -> None:
    assert one_line("a\nb\tc\x1b[31m\u2028") == r"a\nb\tc\x1b[31m\u2028"
    assert one_line("naïve 映画 👩‍🔬") == "naïve 映画 👩‍🔬"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on(stop: signal.Signals, tmp_path: Path) -> None:
    rows = [(n // 8, (n * 7) % 30, n) for n in range(240)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "t"], orient="row").write_csv(
        tmp_path / "e.csv"
    )
    (tmp_path / "r.toml").write_text(
        '[data]\nkind = "files"\nfiles = ["e.csv"]\ntimestamp = "t"\n[split]\nkind = "leave_last"\n'
        '[model]\nkind = "mf"\nembedding_dim = 4\n'
        '[training]\nepochs = 100000\npatience = "none"\ndevice = "cpu"\n'
    )
    command = [sys.executable, "-m", "foretaste", "fit", "r.toml", "--out", "b"]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=-1,
        stderr=-1,
        env=os.environ | {"PYTHONPATH": str(Path(ft.__file__).parents[1])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last = time.monotonic() + 120
    while not (tmp_path / "b.run/checkpoint/manifest.json").exists() and time.monotonic() < last:
        time.sleep(0.1)
    running.send_signal(stop)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (128 + stop, b"")
    line = err.decode().splitlines()[-1]
    assert line.startswith("foretaste: stopped at epoch ")
    assert "--resume" in line
    assert not (tmp_path / "b").exists()
    for left in ("best-987.safetensors", ".model-9.safetensors.ab12.writing"):  # as by a kill
        (tmp_path / "b.run/checkpoint" / left).write_bytes(b"half")
    with pytest.raises(ft.BundleError, match="--resume"):
        ft.start_run(tmp_path / "b")
    assert ft.start_run(tmp_path / "b", resume=True) == ft.run_folder(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recommend", "b", "-k", "0"], "must be at least 1, not '0'"),
        (["recommend", "b", "-k", "five"], "must be a whole number, not 'five'"),
        (["serve", "b", "--port", "99999"], "must be at most 65535, not '99999'"),
        (["serve", "b", "--port", "http"], "must be a whole number, not 'http'"),
        (["tune", "r.toml", "--trials", "0"], "must be at least 1, not '0'"),
        (["compare", "r.toml", "--budget-seconds", "soon"], "must be a number, not 'soon'"),
        (["fit", "r.toml", "--out", "b", "--track", "wandb"], "'wandb' is not one of"),
        (["data", "import", "f", "--out", "s", "--duplicates", "sum"], "'sum' is not one of"),
        (["recommend", "b", "--features", "{a}"], "--features is not JSON"),
        (["recommend", "b", "--context", "hour=9"], "--context is not JSON"),
        (["fit"], "Missing argument"),
        (["fitt"], "Did you mean 'fit'?"),
        (["fit", "r.toml", "--ot", "b"], "No such option: --ot"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_wrong_call_is_said_in_our_words(foretaste: Run, words: list[str], said: str) -> None:
    ended = foretaste(*words)
    assert ended.code == 2
    assert said in ended.err
    for foreign in ("Input should", "Value error", "Expecting", "unable to parse", "pydantic"):
        assert foreign not in ended.err


def test_advice_about_reading_is_an_option_or_a_setting_that_works(
    foretaste: Run, tmp_path: Path
) -> None:
    table, out, recipe = tmp_path / "e.csv", tmp_path / "s", tmp_path / "r.toml"
    events = [f"{user},{item}" for user in "14" for item in range(5)]
    table.write_text("\n".join(["user_id,item_id", events[0], ",3", *events[1:], ""]))
    recipe.write_text(
        f'[data]\nkind = "files"\nfiles = ["{table}"]\n[split]\nkind = "leave_last"\n'
        '[model]\nkind = "popularity"\n'
    )
    ended = foretaste("data", "import", table, "--out", out)
    assert "row 2: the value is missing: fix it, or give --drop-incomplete" in ended.err
    assert foretaste("data", "import", table, "--out", out, "--drop-incomplete").code == 0
    ended = foretaste("fit", recipe, "--out", tmp_path / "b")
    setting = ended.err.strip().rpartition("give ")[2]
    assert setting == "data.drop_incomplete = true"
    given = setting.replace(" = ", "=")
    assert foretaste("fit", recipe, "--out", tmp_path / "b", "--set", given).code == 0
    assert (
        "did you mean --user 'user_id'?"
        in foretaste("data", "import", table, "--out", out, "--replace", "--user", "usr_id").err
    )
