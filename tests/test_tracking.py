"""Logging to experiment trackers."""

import sys
from pathlib import Path

import pytest

from foretaste.cli.main import run as command
from foretaste.errors import ConfigError
from foretaste.experiment.recipe import ExperimentConfig
from foretaste.experiment.run import read_split, start_run
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


@pytest.mark.parametrize("kind", ["mlflow", "tensorboard"])
def test_a_run_that_cannot_be_followed_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[data]\nkind = "files"\nfiles = ["not-there.csv"]\n[split]\nkind = "temporal"\n'
        '[model]\nkind = "mf"\n'
    )
    with pytest.raises(SystemExit):
        command(["fit", str(recipe), "--out", str(tmp_path / "bundle"), "--track", kind])
    assert f"pip install 'foretaste[{kind}]'" in capsys.readouterr().err
    with pytest.raises(ConfigError) as refused:
        start_run(tmp_path / "bundle", track=kind)
    assert (refused.value.name, refused.value.value) == ("track", kind)


def test_an_encoder_that_is_not_there_is_refused_before_anything_is_read() -> None:
    config = ExperimentConfig(
        data={"kind": "files", "files": ["not-there.csv"]},
        split={"kind": "temporal"},
        model={"kind": "two_tower"},
        features={"item": {"title": {"kind": "text", "encoder": "no-such-folder"}}},
    )
    with pytest.raises(ConfigError) as refused:
        read_split(config)
    assert (refused.value.name, refused.value.value) == ("encoder", "no-such-folder")
