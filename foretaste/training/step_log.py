"""The loss of every step, on disk."""

import json
from pathlib import Path
from typing import final


@final
class StepLog:
    """A line of JSON a step; on resuming, lines past the checkpoint are cut off."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "steps.jsonl"
            kept = path.read_text().splitlines(keepends=True)[:step] if step else []
            path.write_text("".join(kept))
            self.file = path.open("a", buffering=1)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, step: int, epoch: int, loss: float) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "epoch": epoch, "loss": loss}) + "\n")
