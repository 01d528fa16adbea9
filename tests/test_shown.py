"""Display of objects: one short line at the prompt, a small table in a notebook."""

import builtins
import io
import pydoc
import re
from html.parser import HTMLParser

import polars as pl
import pytest

import foretaste as ft

EVENTS = ft.read_interactions(
    pl.DataFrame(
        {
            "user_id": [n // 10 for n in range(300)],
            "item_id": [f"<b>{(n * 7 + n // 10) % 20}</b>" for n in range(300)],
            "t": [1_700_000_000 + n for n in range(300)],
            "liked": [n % 2 for n in range(300)],
            **{f"a column with a long name {n}": [n] * 300 for n in range(20)},
        }
    ),
    timestamp="t",
    columns=["liked"],
    context=[f"a column with a long name {n}" for n in range(20)],
)
SPLIT = ft.leave_last_split(EVENTS)
TRAINED = ft.fit(ft.PopularityConfig(), SPLIT, show=False)
REPORT = ft.evaluate(TRAINED, SPLIT.test, k=(5, 10))
RECOMMENDER = ft.build_recommender(TRAINED)
OTHER = ft.evaluate(ft.fit(ft.ItemKNNConfig(), SPLIT, show=False), SPLIT.test, k=(5, 10))
OBJECTS = {
    "events": EVENTS,
    "split": SPLIT,
    "holdout": SPLIT.test,
    "rows": ft.rows_of(SPLIT, "test", tasks=[ft.Task(name="liked")]),
    "features": ft.fit_features(
        ft.schema_from_toml('[context."a column with a long name 1"]\nkind = "categorical"'),
        SPLIT.train,
    ),
    "trained": TRAINED,
    "report": REPORT,
    "reports": ft.Reports(lists=REPORT),
    "comparison": ft.compare(REPORT, OTHER, "ndcg_at_5", resamples=10),
    "recommender": RECOMMENDER,
    "answer": RECOMMENDER.recommend(3),
    "run": ft.Run(trained=TRAINED, report=ft.Reports(lists=REPORT)),
}
every_object = pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)


@every_object
def test_an_object_is_one_short_line(value: object) -> None:
    line = repr(value)
    assert line.startswith(type(value).__name__ + "(")
    assert len(line) < 200
    assert "\n" not in line
    assert " at 0x" not in line


class Tags(HTMLParser):
    """Collects the tags, and checks that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@every_object
def test_an_object_is_a_small_table_in_a_notebook(value: object) -> None:
    html: str = value._repr_html_()  # type: ignore[attr-defined]
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.seen <= {"table", "thead", "tbody", "tr", "th", "td"}  # ids are no tags
    assert 0 < len(html) < 10_000
    assert len(re.findall("<tr>", html)) >= 2


def test_what_is_shown_counts() -> None:
    assert repr(SPLIT.test) == "Holdout('test', 30 queries, 30 targets)"
    assert "30 users" in repr(REPORT)
    assert "10 rows" in repr(OBJECTS["answer"])
    assert f"{REPORT.metrics['ndcg_at_5']:.4f}" in repr(REPORT)


def test_a_printed_report_is_one_output_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    displayed: list[object] = []

    class Shell:
        """As rich looks for a notebook."""

        def __init__(self) -> None:
            self.kernel = True

    ZMQInteractiveShell = type("ZMQInteractiveShell", (Shell,), {})
    monkeypatch.setattr(builtins, "get_ipython", lambda: ZMQInteractiveShell(), raising=False)
    monkeypatch.setattr("rich.jupyter.display", lambda *parts: displayed.append(parts))
    out = io.StringIO()
    print(REPORT, file=out)
    assert displayed == []
    assert "ndcg" in out.getvalue()


SETTINGS = [name for name in ft.__all__ if isinstance(getattr(ft, name), type(ft.Config))]


@pytest.mark.parametrize("name", ["fit", "evaluate", "compare_models", *SETTINGS])
def test_help_is_of_readable_length(name: str) -> None:
    value = getattr(ft, name)
    text = pydoc.plain(pydoc.render_doc(value))
    assert len(text.splitlines()) < 120
    for field, info in getattr(value, "model_fields", {}).items():
        assert field in text
        assert " ".join((info.description or "").split()) in text
