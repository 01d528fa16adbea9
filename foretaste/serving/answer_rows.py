"""The rows of an answer: from what was found to ids, attributes, predictions and sources."""

import math
from collections.abc import Mapping

from foretaste.serving.answer import Recommendation, Source
from foretaste.serving.catalogue_search import Best
from foretaste.serving.items import KnownItems
from foretaste.serving.new_items import NewItems


def answer_rows(
    best: Best, source: Source, items: KnownItems, new: NewItems | None = None
) -> tuple[Recommendation, ...]:
    """Return one row for each item found, best first.

    Args:
        best: A single list, padded with -1.
        source: Where items of the catalogue came from; new ones come from their features.
        items: The catalogue.
        new: The items past the catalogue's.
    """
    item_idx = [item for item in best.top.item_BK[0].tolist() if item >= 0]
    score = best.top.score_BK[0].tolist()
    old = [item for item in item_idx if item < items.num_items]
    shown: dict[int, tuple[int | str, Mapping[str, object], Source]] = {
        item: (item_id, attributes, source)
        for item, item_id, attributes in zip(
            old, items.ids_of(old), items.attributes(old), strict=True
        )
    }
    for row, (item_id, told) in enumerate(() if new is None else new.told.items()):
        shown[items.num_items + row] = item_id, told, "features"
    predicted = {name: value_BK[0].tolist() for name, value_BK in best.prediction.items()}
    return tuple(
        Recommendation(
            item_id,
            score[row],
            where,
            attributes,
            {n: values[row] for n, values in predicted.items() if math.isfinite(values[row])},
        )
        for row, (item_id, attributes, where) in enumerate(shown[item] for item in item_idx)
    )
