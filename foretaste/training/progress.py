"""What a person sees of a run: a moving bar on a terminal, a line an epoch elsewhere."""

from types import TracebackType
from typing import final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from foretaste.training.fit import Epoch
from foretaste.training.fit import Progress as RunProgress


@final
class ShowProgress:
    """Shows a run on the console of standard error, or on the one given."""

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self.epochs = epochs
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:,.1f} steps/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, epoch=1, loss=float("nan"), rate=0.0)

    def __enter__(self) -> "ShowProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, progress: RunProgress, steps_per_epoch: int) -> None:
        """Move the bar; time left is to the last epoch, early stopping may come before it."""
        self._bar.update(
            self._task,
            completed=progress.step,
            total=steps_per_epoch * self.epochs,
            epoch=f"{progress.epoch + 1}/{self.epochs}",
            loss=progress.loss_sum / max(1, progress.counted),
            rate=progress.step / max(progress.seconds, 1e-9),
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False)

    def epoch(self, epoch: Epoch) -> None:
        """Print a line about an epoch that ended."""
        validation = "" if epoch.validation is None else f" · validation {epoch.validation:.4f}"
        self.console.print(
            f"epoch {epoch.epoch}/{self.epochs} · loss {epoch.loss:.4f}{validation} · "
            f"{epoch.events_per_second:,.0f} events/s · {epoch.seconds:,.0f} s",
            highlight=False,
        )
