"""The loss of every step, on disk."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from foretaste.data.folder import reason_of
from foretaste.errors import DataError

STEPS_FILE = "steps.jsonl"


@final
class StepLog:
    """A line of JSON a step; on resuming, lines past the checkpoint are cut off."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.file = None
        self.path = Path(STEPS_FILE) if folder is None else folder / STEPS_FILE
        if folder is None:
            return
        with self._in_our_words():
            folder.mkdir(parents=True, exist_ok=True)
            kept = self.path.read_text().splitlines(keepends=True)[:step] if step else []
            self.path.write_text("".join(kept))
            self.file = self.path.open("a", buffering=1)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written was said by `write`
                self.file.close()

    def write(self, step: int, epoch: int, loss: float) -> None:
        if self.file is not None:
            with self._in_our_words():
                self.file.write(json.dumps({"step": step, "epoch": epoch, "loss": loss}) + "\n")

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written: {reason_of(error)}: make room, then resume from "
                "the last checkpoint",
                name=str(self.path),
                value=str(self.path),
            ) from error
