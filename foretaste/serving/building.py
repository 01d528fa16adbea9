"""From a trained model, or a folder, to a recommender that answers.

Shape legend: I items, Q queries.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foretaste.arguments import checked
from foretaste.errors import ConfigError
from foretaste.models.base import Retriever
from foretaste.retrieval.choose import MEASURED_QUERIES, build_index, may_be_approximate
from foretaste.retrieval.index import IndexChoice
from foretaste.serving.bundle import Bundle, read_bundle
from foretaste.serving.histories import one_query, training_histories
from foretaste.serving.recommender import Recommender
from foretaste.training.trained import Trained


@checked
def build_recommender(
    trained: Trained,
    *,
    index: IndexChoice = "auto",
    report: Mapping[str, object] | None = None,
    fallback: Trained | None = None,
) -> Recommender:
    """Index a trained model's items and make it answer.

    An approximate index is tuned on the vectors of users of training.

    Args:
        trained: What training gave.
        index: Which index a retriever's items go into; see `build_index`. A model without
            vectors has none: "auto" and "exact" score its whole catalogue.
        report: Measured figures to keep beside it, as JSON values.
        fallback: What answers somebody of whom nothing is known, such as popularity within a
            window; its scores for an empty history are kept. Without it, event counts.

    Raises:
        ConfigError: An index is asked for a model without vectors, or `fallback` has another
            catalogue.
        DataError: Training saw no item.
    """
    popular_I, retriever = _popularity(trained, fallback), trained.model.first_stage
    if not isinstance(retriever, Retriever):
        if index not in ("auto", "exact"):
            raise ConfigError(
                f"index is {index!r}, but {type(retriever).__name__} has no item vectors to "
                "index: leave it at 'auto'",
                name="index",
                value=index,
            )
        return Recommender(Bundle(trained=trained, popular_I=popular_I, report=report))
    known_I, codes = trained.known_I, retriever.item_codes()
    asked = "codes" if index == "auto" and codes is not None else index
    is_measured = may_be_approximate(asked, num_items=int(known_I.sum()))
    built = build_index(
        retriever.item_blocks() if codes is None else codes,
        kind=index,
        known_I=known_I,
        seed=trained.seed,
        query_QD=_some_queries(trained, retriever) if is_measured else None,
    )
    bundle = Bundle(trained=trained, index=built, popular_I=popular_I, report=report)
    return Recommender(bundle)


@checked
def load(path: Path | str) -> Recommender:
    """Read a recommender that `save` wrote; every checksum is verified.

    Raises:
        BundleError: The bundle is missing, broken, tampered with or of a newer format.
    """
    return Recommender(read_bundle(Path(path)))


def _popularity(trained: Trained, fallback: Trained | None) -> Tensor:
    events = trained.events
    if fallback is None:
        count_I = torch.from_numpy(events.item_count).float()
    elif not fallback.events.items.ids.equals(events.items.ids):
        raise ConfigError(
            "the fallback was trained on other items: train it on the same events", name="fallback"
        )
    else:
        count_I = fallback.score(one_query(-1, np.empty(0, dtype=np.int64)))[0]
    return count_I.masked_fill(~trained.known_I, -torch.inf)


@torch.inference_mode()
def _some_queries(trained: Trained, model: Retriever) -> Tensor:
    """Return the vectors of some users of training, for an index to be tuned on."""
    user_U = np.flatnonzero(np.diff(trained.events.offsets))
    chosen = np.random.default_rng(trained.seed).permutation(user_U)[:MEASURED_QUERIES]
    return model.encode(training_histories(trained.events, chosen)[0]).float()
