"""implicit's side of `mf_implicit.py`: five epochs of its BPR per turn."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from implicit.cpu.bpr import BayesianPersonalizedRanking
from scipy.sparse import csr_matrix
from turns import read_pairs, say, say_ready, wait_for_turn

SETTINGS = {"factors": 64, "learning_rate": 0.05, "regularization": 0.01, "iterations": 500}
EPOCHS_A_TURN = 5


def main() -> None:
    data, threads, theirs = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    user, item = (np.unique(column, return_inverse=True)[1] for column in read_pairs(data))
    order = np.argsort(user, kind="stable")  # oldest first within a user
    user, item = user[order], item[order]
    from_end = np.searchsorted(user, user, side="right") - np.arange(len(user))
    kept, asked = from_end > 2, from_end == 2
    ones = np.ones(int(kept.sum()), dtype=np.float32)
    shape = (int(user.max()) + 1, int(item.max()) + 1)
    matrix = csr_matrix((ones, (user[kept], item[kept])), shape=shape)
    model = BayesianPersonalizedRanking(**SETTINGS | theirs, num_threads=threads, random_state=0)
    say_ready(["implicit", "numpy"], events=int(kept.sum()), settings=SETTINGS | theirs)
    started = time.perf_counter()

    def tell(epoch: int, *_: object) -> None:
        nonlocal started
        if (epoch + 1) % EPOCHS_A_TURN == 0:
            seconds = time.perf_counter() - started
            value = ndcg_at_10(model, matrix, user[asked], item[asked])
            say({"epoch": epoch + 1, "train_seconds": seconds, "ndcg_at_10": value})
            wait_for_turn()
            started = time.perf_counter()

    model.fit(matrix, show_progress=False, callback=tell)


def ndcg_at_10(
    model: BayesianPersonalizedRanking, seen: csr_matrix, user: np.ndarray, item: np.ndarray
) -> float:
    """Return the mean of 1 / log2(1 + rank) where the rank of the target is 10 or less."""
    score = model.user_factors[user] @ model.item_factors.T
    target = score[np.arange(len(user)), item][:, None]
    rows = np.repeat(np.arange(len(user)), np.diff(seen.indptr)[user])
    score[
        rows, np.concatenate([seen.indices[slice(*seen.indptr[u : u + 2])] for u in user])
    ] = -np.inf
    rank = 1 + (score > target).sum(axis=1)
    return float(np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0).mean())


if __name__ == "__main__":
    main()
