"""What an object looks like at the prompt and in a notebook: one line, and a small table."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape

LONGEST = 190
"""Characters of the line."""


class Shown(ABC):
    """Gives `__repr__` and `_repr_html_` to a class that says its `_facts`."""

    __slots__ = ()

    @abstractmethod
    def _facts(self) -> Mapping[str, object]:
        """Return what a person wants to know first; whole numbers are counts of what is named."""

    def _rows(self) -> Sequence[Sequence[object]]:
        """Return the table, its first row the headings."""
        return [("", type(self).__name__), *self._facts().items()]

    def __repr__(self) -> str:
        words = [_words(name, value) for name, value in self._facts().items()]
        return cut(f"{type(self).__name__}({', '.join(words)})", end="…)")

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        body = "".join(_line(row, "td") for row in rows)
        return f"<table><thead>{_line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def cut(text: str, *, end: str = "…") -> str:
    """Return a text as one line that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - len(end)] + end


def _line(row: Sequence[object], tag: str) -> str:
    cells = "".join(f"<{tag}>{escape(_cell(cell))}</{tag}>" for cell in row)
    return f"<tr>{cells}</tr>"


def _words(name: str, value: object) -> str:
    if isinstance(value, int):
        return f"{value:,} {name}"
    return f"{name} {_cell(value)}".strip()


def _cell(value: object) -> str:
    match value:
        case float():
            return f"{value:.4f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)
