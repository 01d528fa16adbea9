"""The public names, imports without effects, and the first example of the README."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import foretaste as ft
from tests.worlds import film_events

PACKAGE = Path(ft.__file__).parent
MODULES = sorted(
    ".".join(("foretaste", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in PACKAGE.rglob("*.py")
)
WATCH_EFFECTS = """
import importlib, os, socket, sys, threading, warnings
warnings.simplefilter("ignore")

def refuse(event, arguments):
    opens = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    changes = event in ("socket.connect", "os.mkdir", "os.remove", "os.rename")
    if (opens or changes) and "__pycache__" not in str(arguments):
        raise AssertionError(f"{name}: {event} {arguments}")

# What stands below us may do as it likes when it is imported.
import faiss, fastapi, implicit.cpu.als, numba, optuna, polars, prometheus_client, pyarrow, rich
import safetensors.torch, sqlalchemy, torch, typer, uvicorn
arguments, environment, random_state = list(sys.argv), dict(os.environ), torch.get_rng_state()
threads, torch_threads = threading.active_count(), torch.get_num_threads()
sys.addaudithook(refuse)
for name in MODULES:
    importlib.import_module(name)
assert (sys.argv, dict(os.environ)) == (arguments, environment)
assert (threading.active_count(), torch.get_num_threads()) == (threads, torch_threads)
assert torch.equal(torch.get_rng_state(), random_state)
"""

HEAVY = (
    *("faiss", "fastapi", "implicit", "llvmlite", "matplotlib", "mlflow", "numba", "optuna"),
    *("pandas", "polars", "scipy", "sklearn", "sqlalchemy", "tensorboard", "torch", "uvicorn"),
    "torch._dynamo",
)
"""Packages that take a tenth of a second or more to load."""
_LOOPS = {"numba", "llvmlite", "scipy"}
"""numba and what it loads itself."""
LOADED_BY: dict[str, set[str]] = {
    "import foretaste": set(),
    "--help": set(),
    "fit --help": set(),
    "data import --help": set(),
    "data import events.csv --out store": {"polars", *_LOOPS},
    "data schema events.csv": {"polars", *_LOOPS},
    "fit mf.toml --out bundle": {"polars", "torch", *_LOOPS},
    "recommend known --user 7": {"polars", "torch"},
}
"""Of the heavy packages, those that may be loaded after each of these in a fresh process."""
_LOADED = """
import json, sys
import foretaste
words = sys.argv[1:]
try:
    if words != ["import", "foretaste"]:
        from foretaste.cli.main import run
        run(words)
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([name for name in sys.modules if name.count(".") < 2]))
"""


def test_every_public_name_is_listed_sorted_and_there() -> None:
    names = [name for name in ft.__all__ if name != "__version__"]
    assert names == sorted(names)
    for name in names:
        assert getattr(ft, name) is not None, name
    assert set(ft.__all__) <= set(dir(ft))


def test_the_type_checker_and_python_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (checked,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.test, ast.Name)
    )
    imported = [
        alias.name
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == [name for name in ft.__all__ if name != "__version__"]


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="sasrec_config"):
        ft.sasrec_config  # noqa: B018 - looking is the point


@pytest.mark.slow
def test_no_module_does_anything_when_it_is_imported() -> None:
    script = f"MODULES = {MODULES!r}\n{WATCH_EFFECTS}"
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def folder_of_events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, a recipe, and a bundle of a model that scores by dot products."""
    folder = tmp_path_factory.mktemp("imports")
    events = film_events()
    rows = [
        f"{user},{item},{at}"
        for user, item, at in zip(
            events.users.ids[events.user_idx].to_list(),
            events.items.ids[events.item_idx].to_list(),
            events.timestamp_s.tolist(),
            strict=True,
        )
    ]
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows))
    (folder / "mf.toml").write_text(
        '[data]\nkind = "files"\nfiles = ["events.csv"]\n[split]\nkind = "leave_last"\n'
        '[model]\nkind = "mf"\nembedding_dim = 4\n[training]\nepochs = 1\n'
    )
    config = ft.MFConfig(embedding_dim=4)
    training = ft.TrainingConfig(epochs=1)
    model = ft.fit(config, ft.leave_last_split(events), training=training, show=False)
    ft.build_recommender(model).save(folder / "known")
    return folder


@pytest.mark.parametrize("line", LOADED_BY)
def test_a_command_loads_only_what_it_uses(line: str, folder_of_events: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *line.split()],
        capture_output=True,
        text=True,
        cwd=folder_of_events,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded & set(HEAVY) <= LOADED_BY[line]


def test_the_first_snippet_of_the_readme_runs_on_a_small_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    rows = [
        f"{user},{item},{1_600_000_000 + 60 * place + user}"
        for user in range(60)
        for place, item in enumerate(draw.choice(40, size=12, replace=False).tolist())
    ]
    Path("ratings.csv").write_text("userId,movieId,timestamp\n" + "\n".join(rows))
    readme = (PACKAGE.parent / "README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    # The snippet, but for the width of its model.
    small = snippet.replace("embedding_dim=64", "embedding_dim=8, num_blocks=1")
    assert small.count("epochs=3") == small.count("embedding_dim=8") == 1
    scope: dict[str, object] = {}
    exec(compile(small, "README.md", "exec"), scope)  # noqa: S102 - our own text
    assert len(ft.load("my-recommender/").recommend(user_id="42", k=10).rows) == 10
