"""The complete path on a small real data set: from MovieLens-100K to a served recommender."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foretaste.arguments import checked
from foretaste.config import Seed
from foretaste.data.folder import check_place
from foretaste.data.sources.load import get_dataset
from foretaste.data.splits import LeaveLastSplitConfig, SplitConfig, TemporalSplitConfig
from foretaste.data.splitting import make_split
from foretaste.experiment.compare_models import compare_models
from foretaste.experiment.compare_table import ModelComparison
from foretaste.experiment.recipe import ExperimentConfig, PublicData
from foretaste.models.baselines import PopularityConfig
from foretaste.models.sasrec import SASRecConfig
from foretaste.serving.recommender import load
from foretaste.training.objectives import NextItemConfig
from foretaste.training.settings import TrainingConfig

DATASET = "ml-100k"
SASREC = SASRecConfig(embedding_dim=64, max_len=100, dropout=0.3, block="original")
TRAINING = TrainingConfig(
    epochs=20, batch_events=2048, learning_rate=5e-3, warmup_steps=50, schedule="cosine"
)
OBJECTIVE = NextItemConfig(loss="softmax")


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """The result of the quickstart."""

    bundle: str
    tables: tuple[ModelComparison, ...]
    """SASRec and the baselines, on each of two splits."""
    sentences: tuple[str, ...]
    """The leaks of the splits, and the contents of the bundle."""

    @checked
    def to_json(self) -> dict[str, object]:
        """Return everything as plain JSON values."""
        tables = [table.to_json() for table in self.tables]
        return {"bundle": self.bundle, "tables": tables, "sentences": list(self.sentences)}


@checked
def run_quickstart(
    out: str | Path,
    *,
    data_dir: Path | str | None = None,
    seed: Seed = 0,
    replace: bool = False,
    say: Callable[[str], object],
) -> Quickstart:
    """Get MovieLens-100K, compare SASRec with the baselines, and write SASRec's bundle.

    Two splits are shown. The temporal split is honest and hard, because few users of its test have
    a history. The leave-last split has a test event for every user, and reports its leaks. The
    bundle has SASRec trained again on all events, for as many epochs as the leave-last run chose,
    and the report of that run.

    Args:
        out: Folder of the bundle.
        data_dir: Folder that already has the data set's files.
        seed: The seed of the run.
        replace: Replace an existing bundle.
        say: Called with a line about each step.

    Raises:
        SourceError: The data set cannot be downloaded.
        BundleError: `out` exists and `replace` is false, or the bundle cannot be written.
    """
    out = Path(out)
    check_place(out, "bundle", replace=replace)
    say(f"getting {DATASET}")
    dataset = get_dataset(DATASET, data_dir=data_dir)
    events = dataset.events
    say(f"{len(events):,} events of {events.num_users:,} users from {dataset.origin}")
    tables, leaks = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "comparison"
        for kind, results in (
            (TemporalSplitConfig(stop_on="leave_last"), None),
            (LeaveLastSplitConfig(), folder),
        ):
            split, recipes = make_split(kind, events), _recipes(kind, seed=seed)
            say(f"split {split.kind}")
            table = compare_models(recipes, split, folder=results, keep="sasrec", say=say)
            tables.append(table)
            leaks += [f"what leaks from the split {split.kind}: {leak}" for leak in split.leaks]
        load(folder / "bundle").save(out, replace=replace)
    return Quickstart(
        bundle=str(out),
        tables=tuple(tables),
        sentences=(
            *leaks,
            "the bundle's SASRec was trained again, on all events, so it was not measured: the "
            "report in the bundle is that of leave_last",
            f"the bundle is in {out}",
        ),
    )


def _recipes(split: SplitConfig, *, seed: int) -> dict[str, ExperimentConfig]:
    """Return SASRec and a further baseline; a comparison adds the others."""
    sasrec = ExperimentConfig(
        seed=seed,
        data=PublicData(name=DATASET),
        split=split,
        model=SASREC,
        objective=OBJECTIVE,
        training=TRAINING,
    )
    newest = {"model": PopularityConfig(window_days=30), "objective": None}
    return {"sasrec": sasrec, "popularity, last 30 days": sasrec.model_copy(update=newest)}
