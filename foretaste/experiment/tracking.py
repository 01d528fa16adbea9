"""Experiment trackers: MLflow and TensorBoard, extras that only their own classes import."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, final, runtime_checkable

from foretaste.arguments import checked
from foretaste.errors import ConfigError
from foretaste.later import installed

TrackerKind = Literal["mlflow", "tensorboard"]


@runtime_checkable
class Tracker(Protocol):
    """Writes the settings and figures of a run to a tracker."""

    def log_settings(self, settings: Mapping[str, object]) -> None:
        """Write the settings of the run; nested settings get dotted names."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write the numbers of a step or epoch by name."""
        ...

    def close(self) -> None:
        """Write pending data; nothing may be logged afterwards."""
        ...


@checked
def open_tracker(kind: TrackerKind, *, folder: Path | str, run: str) -> Tracker:
    """Open a tracker that writes below `folder`, under the name `run`.

    Raises:
        ConfigError: The tracker's package is not installed; the message names the extra.
    """
    folder = Path(folder)
    match kind:
        case "mlflow":
            return MLflowTracker(folder, run=run)
        case "tensorboard":
            return TensorBoardTracker(folder / run)


def check_tracker(kind: TrackerKind) -> None:
    """Check before any work that a tracker can be opened.

    Raises:
        ConfigError: Its package is not installed; the message names the extra.
    """
    if not installed(kind):
        raise _not_installed(kind)


@contextmanager
def followed(
    kind: TrackerKind | None, folder: Path | None, *, name: str, settings: Mapping[str, object]
) -> Iterator[Tracker | None]:
    """Give a tracker with a run's settings, in a folder or the current one; None without `kind`.

    Args:
        kind: The kind of tracker; None: no tracker.
        folder: The folder of the run, whose name the run gets.
        name: The name of a run without a folder.
        settings: The settings of the run.

    Raises:
        ConfigError: The tracker's package is not installed.
    """
    if kind is None:
        yield None
        return
    place = folder or Path()
    tracker = open_tracker(kind, folder=place / kind, run=place.stem or name)
    tracker.log_settings(settings)
    try:
        yield tracker
    finally:
        tracker.close()


@final
class TensorBoardTracker:
    """Writes TensorBoard's event files; read them with `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path) -> None:
        """Open a writer.

        Raises:
            ConfigError: The extra is not installed.
        """
        writer = _extra("torch.utils.tensorboard", needs="tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder))

    @checked
    def log_settings(self, settings: Mapping[str, object]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in flatten(settings).items())
        self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    @checked
    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    @checked
    def close(self) -> None:
        self._writer.close()


@final
class MLflowTracker:
    """Writes a run to MLflow: to the server of MLFLOW_TRACKING_URI, else to a file in `folder`."""

    def __init__(self, folder: Path, *, run: str) -> None:
        """Start a run in the experiment `foretaste`.

        Raises:
            ConfigError: The extra is not installed.
        """
        mlflow = _extra("mlflow", needs="mlflow")
        folder.mkdir(parents=True, exist_ok=True)
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        self._client = mlflow.MlflowClient()
        known = self._client.get_experiment_by_name("foretaste")
        experiment = known.experiment_id if known else self._client.create_experiment("foretaste")
        self._run_id = self._client.create_run(experiment, run_name=run).info.run_id

    @checked
    def log_settings(self, settings: Mapping[str, object]) -> None:
        for name, value in flatten(settings).items():
            self._client.log_param(self._run_id, name, value)

    @checked
    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    @checked
    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested settings: `{"model": {"kind": "ease"}}` becomes `model.kind`."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _extra(module: str, *, needs: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _not_installed(needs) from error


def _not_installed(kind: str) -> ConfigError:
    return ConfigError(
        f"tracking with {kind} needs an extra: pip install 'foretaste[{kind}]'",
        name="track",
        value=kind,
    )
