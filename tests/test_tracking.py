"""The door to experiment trackers."""

import sys
from pathlib import Path

import pytest

from foretaste.errors import ConfigError
from foretaste.experiment.tracking import Tracker, flatten, open_tracker


def test_nested_settings_get_dotted_names() -> None:
    settings = {"seed": 1, "model": {"kind": "ease", "inner": {"l2": 5.0}}}
    assert flatten(settings) == {"seed": 1, "model.kind": "ease", "model.inner.l2": 5.0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_logged_to_tensorboard_can_be_read_from_its_files(tmp_path: Path) -> None:
    accumulate = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_tracker("tensorboard", folder=tmp_path, run="one")
    assert isinstance(tracker, Tracker)
    tracker.log_settings({"seed": 3})
    tracker.log_metrics({"loss": 2.5}, step=1)
    tracker.log_metrics({"loss": 1.5}, step=2)
    tracker.close()
    events = accumulate.EventAccumulator(str(tmp_path / "one"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


@pytest.mark.filterwarnings("ignore")
def test_what_is_logged_to_mlflow_can_be_read_from_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    tracker = open_tracker("mlflow", folder=tmp_path, run="one")
    tracker.log_settings({"model": {"kind": "ease"}})
    tracker.log_metrics({"loss": 1.5}, step=2)
    tracker.close()
    (run,) = mlflow.search_runs(experiment_names=["foretaste"], output_format="list")
    assert (run.data.params, run.data.metrics) == ({"model.kind": "ease"}, {"loss": 1.5})


@pytest.mark.parametrize(
    ("kind", "module"), [("mlflow", "mlflow"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_tracker_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'foretaste\[{kind}\]'"):
        open_tracker(kind, folder=tmp_path, run="one")
