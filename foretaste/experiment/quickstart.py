"""The whole path on a small real data set: MovieLens-100K to a measured, served recommender."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from foretaste.arguments import checked
from foretaste.config import Seed
from foretaste.data.folder import check_place
from foretaste.data.sources.load import get_dataset
from foretaste.data.splits import LeaveLastSplitConfig, Split, TemporalSplitConfig
from foretaste.data.splitting import leave_last_split, make_split
from foretaste.evaluation.compare import Reports, compare
from foretaste.evaluation.protocol import evaluate
from foretaste.evaluation.report import Report
from foretaste.experiment.fit import fit
from foretaste.experiment.recipe import ExperimentConfig, PublicData
from foretaste.experiment.run import Run, fit_final, to_recommender
from foretaste.models.baselines import (
    EASEConfig,
    ImplicitALSConfig,
    ItemKNNConfig,
    PopularityConfig,
)
from foretaste.models.catalogue import ModelConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.training.objectives.sequences import NextItemConfig
from foretaste.training.settings import TrainingConfig
from foretaste.training.trained import Trained

DATASET = "ml-100k"
SASREC = SASRecConfig(embedding_dim=64, max_len=100, dropout=0.3, block="original")
TRAINING = TrainingConfig(
    epochs=20, batch_events=2048, learning_rate=5e-3, warmup_steps=50, schedule="cosine"
)
OBJECTIVE = NextItemConfig(loss="softmax")
BASELINES: tuple[ModelConfig, ...] = (
    PopularityConfig(),
    PopularityConfig(window_days=30),
    ItemKNNConfig(),
    EASEConfig(),
    ImplicitALSConfig(),
)
_SHOWN = ("hit_rate_at_10", "ndcg_at_10", "recall_at_20", "coverage_at_10")


@dataclass(frozen=True, kw_only=True)
class QuickTable:
    """All models on one split."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]
    """The model's name, its figures, seconds of training."""


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What the quickstart found."""

    bundle: str
    tables: tuple[QuickTable, ...]
    sentences: tuple[str, ...]
    """What the tables mean, and what they do not."""

    @checked
    def to_json(self) -> dict[str, object]:
        """Return all of it as plain JSON values."""
        return asdict(self)


@checked
def run_quickstart(
    out: str | Path,
    *,
    data_dir: Path | str | None = None,
    seed: Seed = 0,
    replace: bool = False,
    say: Callable[[str], object],
) -> Quickstart:
    """Get MovieLens-100K, train SASRec and the baselines, measure them, write the bundle.

    Two splits are shown. The temporal one is honest and hard: few users of its test have a
    history. Leave-last has a test event for every user, and says what leaks. The bundle holds
    SASRec trained once more on all events, for as many epochs as the second chose; the report in
    it is the second's.

    Args:
        out: Folder of the bundle.
        data_dir: Where the data set's files lie already.
        seed: Decides the run.
        replace: A bundle that is there is replaced.
        say: Told what is being done.

    Raises:
        SourceError: The data set cannot be had.
        BundleError: `out` exists and `replace` is false, or the bundle cannot be written.
    """
    out = Path(out)
    check_place(out, "bundle", replace=replace)
    say(f"getting {DATASET}")
    dataset = get_dataset(DATASET, data_dir=data_dir)
    events = dataset.events
    say(f"{len(events):,} events of {events.num_users:,} users from {dataset.origin}")
    temporal = make_split(TemporalSplitConfig(stop_on="leave_last"), events)
    last = leave_last_split(events)
    found = [
        _measure(split, title, seed=seed, say=say)
        for split, title in (
            (temporal, "by time: each event of the newest tenth, from all before it"),
            (last, "leave last: each user's last event"),
        )
    ]
    say("training SASRec again, on all events")
    run = _with_final(found[1].best, last, seed=seed)
    say("building the index and writing the bundle")
    to_recommender(*run.final).save(out, replace=replace)
    sentences = [sentence for part in found for sentence in part.sentences]
    return Quickstart(
        bundle=str(out),
        tables=tuple(part.table for part in found),
        sentences=(
            *sentences,
            "the bundle's SASRec was trained again, on all events, so it was not measured: the "
            "report in the bundle is that of leave last",
            f"the bundle is in {out}",
        ),
    )


def _with_final(best: tuple[Trained, Report], split: Split, *, seed: int) -> Run:
    """Train the measured SASRec once more, on all events, as a recipe with this `final` does."""
    trained, report = best
    config = ExperimentConfig(
        seed=seed,
        data=PublicData(name=DATASET),
        split=LeaveLastSplitConfig(),
        model=SASREC,
        objective=OBJECTIVE,
        training=TRAINING,
        final="all",
    )
    final = fit_final(trained, config, split)
    return Run(trained=trained, report=Reports(lists=report), refitted=final)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Measured:
    table: QuickTable
    best: tuple[Trained, Report]
    """SASRec's."""
    sentences: tuple[str, ...]


def _measure(split: Split, title: str, *, seed: int, say: Callable[[str], object]) -> _Measured:
    found: list[tuple[str, Trained, Report]] = []
    for config in (SASREC, *BASELINES):
        name = _name(config)
        say(f"training {name} ({title})")
        trained = fit(config, split, seed=seed, training=TRAINING, objective=OBJECTIVE)
        found.append((name, trained, evaluate(trained, split.test, k=(10, 20))))
    rows: list[tuple[str | float, ...]] = [
        (name, *(report.metrics[metric] for metric in _SHOWN), trained.train_seconds)
        for name, trained, report in found
    ]
    _, trained, report = found[0]
    return _Measured(
        table=QuickTable(title=title, columns=(*_SHOWN, "seconds"), rows=tuple(rows)),
        best=(trained, report),
        sentences=_sentences(split, title, found),
    )


def _sentences(
    split: Split, title: str, found: list[tuple[str, Trained, Report]]
) -> tuple[str, ...]:
    """Say how many users decide, whether SASRec beats the best baseline, and what leaks."""
    _, _, first = found[0]
    rival, _, second = max(found[1:], key=lambda row: row[2].metrics["ndcg_at_10"])
    against = compare(first, second, "ndcg_at_10")
    sentences = (
        f"{title}: {first.counts['users']:,} test users have a history",
        f"SASRec minus {rival}, the best baseline: {against}",
        *(f"what leaks: {leak}" for leak in split.leaks),
    )
    return tuple(sentences)


def _name(config: ModelConfig) -> str:
    match config:
        case PopularityConfig(window_days=float(days)):
            return f"popularity, last {days:g} days"
        case _:
            return _NAMES[config.kind]


_NAMES = {
    "sasrec": "SASRec",
    "popularity": "popularity",
    "item_knn": "item-kNN",
    "ease": "EASE",
    "als": "implicit ALS",
}
