"""The pages say what is so: every example runs, every setting and command stands there."""

import importlib.machinery
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import foretaste as ft

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
    """A folder with the tables and the recipes that the pages speak of."""
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


def test_every_setting_that_a_recipe_may_hold_is_in_the_reference() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    parts = ft.ExperimentConfig.model_json_schema()["$defs"]
    del parts["FeatureSchema"]  # its sections are named after the caller's columns
    for name, part in parts.items():
        for setting in part.get("properties", {}).keys() - {"kind"}:
            assert f"| `{setting}` |" in page, f"{name}.{setting}"
