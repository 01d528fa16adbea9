"""The documentation is correct: every example runs, every setting and command is described."""

import ast
import importlib.machinery
import importlib.util
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.config import Config
from foretaste.evaluation.measure_queries import ACCURACY

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = [
    page for page in (ROOT / "README.md", *PAGES) if "```python" in page.read_text(encoding="utf-8")
]


def script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the tables and recipes that the pages use."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    rows = [
        f"{user},{item},{draw.integers(1, 6)},{1_600_000_000 + 3600 * place + user}"
        for user in range(60)
        for place, item in enumerate(draw.choice(40, size=12, replace=False).tolist())
    ]
    Path("ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows))
    genres = ("Horror", "Comedy|Drama", "Drama", "Comedy|Horror")
    films = "\n".join(f"{item},Film {item},{genres[item % 4]},{1980 + item}" for item in range(40))
    Path("movies.csv").write_text("movieId,title,genres,year\n" + films)
    for page, file in (("recipes", "run.toml"), ("tasks", "tasks.toml")):
        for text in re.findall(r"```toml\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S):
            Path(file).write_text(text)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_every_example_of_a_page_runs_from_its_top_to_its_end(page: Path) -> None:
    scope: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(code, page.name, "exec"), scope)  # noqa: S102 - our own text


@pytest.mark.parametrize("name", ["commands", "settings"])
def test_every_command_and_setting_is_documented_as_it_is(name: str) -> None:
    written = getattr(script("reference"), name)()
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == written, (
        "run scripts/reference"
    )


def test_the_tables_of_the_pages_come_from_the_records() -> None:
    for path, text in script("readme_tables").pages().items():
        assert path.read_text(encoding="utf-8") == text, "run scripts/readme_tables"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_command_in_the_pages_exists() -> None:
    known = {
        line[13:]
        for line in (ROOT / "docs/commands.md").read_text().splitlines()
        if line.startswith("## foretaste ")
    }
    for page in (ROOT / "README.md", *PAGES):
        for call in re.findall(r"^\$ foretaste (.+)$", page.read_text(encoding="utf-8"), re.M):
            words = call.split()
            assert words[0] in known or " ".join(words[:2]) in known, call


def test_each_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"docs/{page.name}" not in readme] == []


def all_settings(kind: type[Config]) -> Iterator[type[Config]]:
    for child in kind.__subclasses__():
        yield child
        yield from all_settings(child)


def test_every_setting_has_a_meaning() -> None:
    for module in pkgutil.walk_packages(ft.__path__, "foretaste."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    without = [
        f"{kind.__name__}.{name}"
        for kind in all_settings(Config)
        for name, field in kind.model_fields.items()
        if kind.__module__.startswith("foretaste.")
        and name != "kind"
        and not (field.description or "").strip()
    ]
    assert without == []


def test_every_setting_that_a_recipe_may_hold_is_in_the_reference() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    parts = ft.ExperimentConfig.model_json_schema()["$defs"]
    del parts["FeatureSchema"]  # its sections are named after the caller's columns
    for name, part in parts.items():
        for setting in part.get("properties", {}).keys() - {"kind"}:
            assert f"| `{setting}` |" in page, f"{name}.{setting}"


BUILT = (ROOT / "docs/how-it-is-built.md").read_text(encoding="utf-8")


def test_the_drawing_of_the_packages_has_the_arrows_that_are_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    checked = [
        layer.replace("foretaste.", "")
        for layer in settings["tool"]["importlinter"]["contracts"][0]["layers"]
    ]
    drawing = re.findall(r"```text\n(.*?)```", BUILT, re.S)[0]
    assert re.findall(r"^(\w+(?: \| \w+)*)", drawing, re.M) == checked
    packages = {path.parent.name for path in (ROOT / "foretaste").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"\w+", " ".join(checked)))


def test_all_that_the_page_on_the_code_names_is_there() -> None:
    names = {"forward", "draw"}  # methods of torch's and of many classes
    for path in (ROOT / "foretaste").rglob("*.py"):
        names.add(path.parent.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
    prose = re.sub(r"```.*?```", "", BUILT, flags=re.S)
    for quoted in re.findall(r"`([^`]+)`", prose):
        if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", quoted) and not (ROOT / quoted).exists():
            others = {"match", "score_BI", "Case", "lint", "relevance_BK", "config"}
            assert set(quoted.split(".")) <= names | others, quoted
        elif re.fullmatch(r"[a-z_/]+\.(py|toml|md)|[a-z]+/[a-z]+", quoted):
            assert (ROOT / quoted).exists() or (ROOT / "foretaste" / quoted).exists(), quoted


def test_the_first_change_of_the_page_works(monkeypatch: pytest.MonkeyPatch) -> None:
    # User 1 has c, and b is the target; a is more popular, so b is at place 2: (1 - 0.8) * 0.8.
    scope: dict[str, object] = {}
    function, by_hand = re.findall(r"```python\n(.*?)```", BUILT, re.S)
    exec(function, scope)  # noqa: S102 - our own text
    exec(by_hand, scope)  # noqa: S102 - our own text
    monkeypatch.setitem(ACCURACY, "rank_biased_precision", scope["rank_biased_precision"])
    table = pl.DataFrame(
        {
            "user_id": [1, 2, 3, 4, 2, 3, 1],
            "item_id": ["c", "a", "a", "a", "b", "b", "b"],
            "part": [0, 0, 0, 0, 0, 0, 2],
        }
    )
    split = ft.given_split_by_column(ft.read_interactions(table, columns=["part"]))
    report = ft.evaluate(ft.fit(ft.PopularityConfig(), split), split.test, k=(1, 2))
    assert report.metrics["rank_biased_precision_at_1"] == 0
    assert report.metrics["rank_biased_precision_at_2"] == pytest.approx(0.2 * 0.8)
    assert report.chance["rank_biased_precision_at_2"] == pytest.approx((0.2 + 0.2 * 0.8) / 2)
