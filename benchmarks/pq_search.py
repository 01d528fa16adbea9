"""Search the best 100 items in a compressed catalogue: by codes, by a plain scan, and by FAISS.

    python benchmarks/pq_search.py --items 1000000 2000000 --out benchmarks/results/pq-search.json

Events are those of `catalogue.py`; an MF learns from them for `--seconds` with quantised tables, 64
wide. 1,000 users' vectors are asked for their best 100: `exact` reports whether each list equals
that of a scan of the decompressed table, except for items whose scores differ by less than 1e-5 of
the highest. Searches are timed one query at a time on one thread, in turns with the plain scan (a
matrix product with the decompressed table, then top-k) and with FAISS's IndexPQ over the same codes
(both on every tenth query). Each has wall-clock and processor seconds; other work on the machine
affects the latter less. Scores of 32 queries for all items, as in evaluation, are timed in the same
way: by codes, and by decompressing the table in blocks.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from catalogue import BATCH, large_events
from torch import Tensor

import foretaste as ft
from foretaste.experiment.record import run_facts
from foretaste.models.layers.table import Table
from foretaste.models.layers.table_kinds import QuantisedConfig
from foretaste.retrieval.choose import build_index

WIDTH, K, ASKED, BLOCK, CLOSE = 64, 100, 1000, 32, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 2_000_000])
    parser.add_argument("--sub-spaces", type=int, nargs="+", default=[8])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    document: dict[str, Any] = {"rows": []}
    if asked.out.exists():
        document = json.loads(asked.out.read_text(encoding="utf-8"))
    for items in asked.items:
        for sub_spaces in asked.sub_spaces:
            row = measured(items, sub_spaces, asked.seconds)
            print(row, flush=True)
            same = (items, sub_spaces)
            others = [r for r in document["rows"] if (r["items"], r["sub_spaces"]) != same]
            document = {"rows": [*others, row], **run_facts()}
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measured(num_items: int, sub_spaces: int, seconds: float) -> dict[str, Any]:
    query_QD, rows = learned(num_items, sub_spaces, seconds)
    codes: Any = rows.codes()
    whole = torch.ones(num_items, dtype=torch.bool)
    index: Any = build_index(codes, known_I=whole)
    plain = build_index(codes, kind="exact", known_I=whole)
    peer = faiss.IndexPQ(WIDTH, sub_spaces, 8, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(codes.book_MCd.numpy().ravel(), peer.pq.centroids)
    faiss.copy_array_to_vector(codes.code_RM.numpy().ravel(), peer.codes)
    peer.ntotal, peer.is_trained = num_items, True
    none_1 = torch.full((1, 0), -1)
    exact = [
        equal(index, plain, query_bD, torch.full((len(query_bD), 0), -1))
        for query_bD in query_QD.split(8)
    ]
    took: dict[str, list[tuple[float, float]]] = {"codes": [], "plain": [], "faiss": []}
    for place, query_1D in enumerate(query_QD.split(1)):
        took["codes"].append(timed(partial(index.search, query_1D, K, exclude_BX=none_1)))
        if place % 10 == 0:
            took["plain"].append(timed(partial(plain.search, query_1D, K, exclude_BX=none_1)))
            took["faiss"].append(timed(partial(peer.search, query_1D.numpy(), K)))
    many = {
        "scores": [timed(partial(rows.products, query_QD[:BLOCK])) for _ in range(5)],
        "decompressed": [timed(partial(Table.products, rows, query_QD[:BLOCK])) for _ in range(5)],
    }
    return {
        "items": num_items,
        "sub_spaces": sub_spaces,
        "exact": all(exact),
        "threads": 1,
        **percentiles(took["codes"], ""),
        **percentiles(took["plain"], "plain_scan_"),
        **percentiles(took["faiss"], "faiss_"),
        "queries": len(query_QD),
        **{f"of_{BLOCK}_{name}_cpu_ms": ms(np.median(of(t, 1))) for name, t in many.items()},
    }


def learned(num_items: int, sub_spaces: int, seconds: float) -> tuple[Tensor, Table]:
    """Return trained users' vectors, and the trained table of items."""
    frame = large_events(num_items // 5, num_items, seed=0)
    events = ft.read_interactions(frame, user="user", item="item", timestamp="time")
    split = ft.temporal_split(events, validation=0.0, test=ASKED / len(events))
    table = QuantisedConfig(sub_spaces=sub_spaces)
    trained = ft.fit(
        ft.MFConfig(embedding_dim=WIDTH, table=table),
        split,
        training=ft.TrainingConfig(epochs=1, batch_events=BATCH, learning_rate=1e-2),
        objective=ft.PairsConfig(loss="sampled_softmax", negatives=512),
        max_seconds=seconds,
        show=False,
    )
    print(num_items, sub_spaces, "steps", trained.log["steps"], flush=True)
    model: Any = trained.model
    user_Q = np.random.default_rng(1).permutation(events.num_users)[:ASKED]
    with torch.no_grad():
        return model.user_table(torch.from_numpy(user_Q)), model.item_table


def equal(index: Any, plain: Any, query_BD: Tensor, none: Tensor) -> bool:
    """Return whether two indexes give the same lists, except for near ties."""
    mine = index.search(query_BD, K, exclude_BX=none)
    its = plain.search(query_BD, K, exclude_BX=none)
    close = CLOSE * its.score_BK.abs().amax(dim=1, keepdim=True)
    item_VD = plain.vectors_at(mine.item_BK)
    true_BK = torch.einsum("bkd,bd->bk", item_VD, query_BD)
    right_BK = (mine.score_BK - its.score_BK).abs() <= close
    return bool((right_BK & ((true_BK - its.score_BK).abs() <= close)).all())


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and processor seconds."""
    clock, process = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - process


def of(took: list[tuple[float, float]], which: int) -> np.ndarray:
    return np.array(took)[:, which]


def ms(seconds: Any) -> float:
    return round(1e3 * float(seconds), 3)


def percentiles(took: list[tuple[float, float]], name: str) -> dict[str, float]:
    """Return the median and the 99th percentile of wall-clock and processor time."""
    return {
        f"{name}{cpu}p{p}_ms": ms(np.percentile(of(took, which), p))
        for which, cpu in enumerate(("", "cpu_"))
        for p in (50, 99)
    }


if __name__ == "__main__":
    main()
