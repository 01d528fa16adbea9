"""From a recipe to a trained, measured model: data, split, fit, evaluate, and a refit if asked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from foretaste.data.interactions import Interactions
from foretaste.data.reading import read_interactions
from foretaste.data.sources.registry import get_dataset
from foretaste.data.split_config import make_split
from foretaste.data.splits import Split
from foretaste.data.store import open_store
from foretaste.evaluation.protocol import evaluate
from foretaste.evaluation.report import Report
from foretaste.experiment.fit import fit
from foretaste.experiment.recipe import ExperimentConfig, FileData, PublicData, StoreData
from foretaste.training.fit import Epoch
from foretaste.training.trained import Trained


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """What a recipe gave."""

    trained: Trained
    report: Report
    """Of the test part."""
    refitted: Trained | None = None
    """Trained with the validation events too, where the recipe asks for it."""
    refitted_report: Report | None = None

    @property
    def final(self) -> tuple[Trained, Report]:
        """The model to serve and its report: the refitted one where there is one."""
        if self.refitted is None or self.refitted_report is None:
            return self.trained, self.report
        return self.refitted, self.refitted_report


def read_split(config: ExperimentConfig, *, data_dir: Path | None = None) -> Split:
    """Read a recipe's data and cut it.

    Args:
        config: The recipe.
        data_dir: Where files lie: a public data set's own, and those that a recipe names by a
            path that is not absolute.

    Raises:
        DataError: The tables are wrong, or cannot be cut so.
        SourceError: The public data set cannot be had.
        BundleError: The event store is missing or broken.
    """
    return make_split(config.split, _read_events(config.data, data_dir))


def run_experiment(
    config: ExperimentConfig,
    split: Split,
    *,
    folder: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Run:
    """Fit a recipe's model, report it on the test part, and refit it if the recipe says so.

    Args:
        config: The recipe.
        split: Its data, from `read_split`.
        folder: Where checkpoints and the log of steps go; without one there are none.
        resume: Go on from the checkpoint in `folder`.
        on_epoch: Told of each epoch when it ends.
    """
    trained = _fit(config, split, folder=folder, resume=resume, on_epoch=on_epoch)
    report = _report(config, trained, split)
    if not config.refit:
        return Run(trained=trained, report=report)
    training = config.training.model_copy(update={"epochs": _epochs_chosen(trained)})
    again = config.model_copy(update={"training": training})
    refitted = _fit(
        again,
        split.refit(),
        folder=None if folder is None else folder / "refit",
        resume=resume,
        on_epoch=on_epoch,
    )
    return Run(
        trained=trained,
        report=report,
        refitted=refitted,
        refitted_report=_report(config, refitted, split),
    )


def _fit(
    config: ExperimentConfig,
    split: Split,
    *,
    folder: Path | None,
    resume: bool,
    on_epoch: Callable[[Epoch], None] | None,
) -> Trained:
    trained = fit(
        config.model,
        split,
        seed=config.seed,
        training=config.training,
        objective=config.objective,
        folder=folder,
        resume=resume,
        on_epoch=on_epoch,
    )
    return replace(trained, settings=config.model_dump(mode="json", exclude_none=True))


def _report(config: ExperimentConfig, trained: Trained, split: Split) -> Report:
    evaluation = config.evaluation
    return evaluate(trained, split.test, k=evaluation.k, exclude_seen=evaluation.exclude_seen)


def _epochs_chosen(trained: Trained) -> int:
    """Return how many epochs validation chose; 1 for a model that learns in closed form."""
    epochs = trained.log.get("best_epoch", 1)
    return epochs if isinstance(epochs, int) else 1


def _read_events(data: PublicData | FileData | StoreData, data_dir: Path | None) -> Interactions:
    base = data_dir or Path()
    match data:
        case PublicData():
            return get_dataset(data.name, data_dir=data_dir).events
        case StoreData():
            return open_store(base / data.path)
        case FileData():
            return read_interactions(
                [base / file for file in data.files],
                user=data.user,
                item=data.item,
                timestamp=data.timestamp,
                rating=data.rating,
            )
