"""Why an item is offered: which item of a history speaks for it most ("because you watched").

Shape legend: L events, T items, C distinct items of the history.
"""

import numpy as np
import torch
from jaxtyping import Int64

from foretaste.serving.catalogue_search import CatalogueSearch
from foretaste.serving.histories import without_each

EXPLAINED_EVENTS = 50
"""How many of a history's last events are tried as a reason."""


def reasons(
    search: CatalogueSearch, history_L: Int64[np.ndarray, " L"], item_T: Int64[np.ndarray, " T"]
) -> Int64[np.ndarray, " T"]:
    """Return the item of the history that speaks for each item most; -1 where none does.

    Of a ranker that attends, it is the item that the ranker attends to most. Else it is the one
    whose removal lowers the score most, of the distinct items of the last `EXPLAINED_EVENTS`. An
    item is no reason for itself.
    """
    if len(history_L) == 0 or len(item_T) == 0:
        return np.full(len(item_T), -1)
    attention_TL = search.attention(history_L, torch.from_numpy(item_T))
    if attention_TL is None:
        reason_C, without = without_each(history_L, last=EXPLAINED_EVENTS)
        score_CT = search.scores([history_L, *without], torch.from_numpy(item_T))
        weight_CT = (score_CT[0] - score_CT[1:]).numpy()
    else:
        reason_C, place_L = np.unique(history_L, return_inverse=True)
        weight_CT = np.zeros((len(reason_C), len(item_T)), dtype=np.float32)
        np.add.at(weight_CT, place_L, attention_TL.T.numpy())
    weight_CT[reason_C[:, None] == item_T] = -np.inf
    return np.where(weight_CT.max(axis=0) > 0, reason_C[weight_CT.argmax(axis=0)], -1)
