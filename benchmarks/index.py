"""Recall, answer time and build cost of each kind of index, by size of the catalogue.

    python benchmarks/index.py --items 100000 1000000 --out benchmarks/results/index.json

Vectors are synthetic, 64 wide: 1,000 clusters with a spread of .7, a spectrum that falls as 1 /
√rank, and lengths that differ by 15 %. A query is the mean of three clusters with noise, like a
user with three tastes. Each kind runs in its own process, whose peak memory the parent reads
(`peak_gib`, including the mapped vectors: `vectors_gib`). The process builds the index in blocks
and saves it; another process maps it and searches the best 100 for `--asked` queries one by one on
one thread. These queries were not used to tune the width (`--recall`). With `--changed`, that many
rows changed after the index was built; `bound` is the number of changes after which it would be
rebuilt. Milliseconds and `build_s` are processor time, which other work on the machine affects
little.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from catalogue import in_process

from foretaste.experiment.record import run_facts
from foretaste.retrieval.changing import ChangingIndex
from foretaste.retrieval.choose import build_index, load_index
from foretaste.retrieval.index import IndexChoice

KINDS = ("exact", "ivf_sq8", "ivf_pq", "hnsw")
WIDTH, CLUSTERS, BLOCK, K = 64, 1000, 2**18, 100


def main() -> None:
    asked = parse()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if asked.one == "ask":
        print(json.dumps(answers(asked.folder, asked.asked, asked.changed)))
    elif asked.one:
        print(json.dumps(built(asked.folder, asked.one, asked.recall)))
    else:
        measure(asked)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--asked", type=int, default=500)
    parser.add_argument("--changed", type=int, default=0)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure(asked: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    if asked.out.exists():
        rows = json.loads(asked.out.read_text(encoding="utf-8"))["rows"]
    for items in asked.items:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_vectors(folder, items, asked.asked)
            for kind in asked.kinds:
                told = ["--folder", name, "--recall", str(asked.recall)]
                facts, peak = in_process(__file__, "--one", kind, *told)
                told += ["--asked", str(asked.asked), "--changed", str(asked.changed)]
                found, _ = in_process(__file__, "--one", "ask", *told)
                row = {"items": items, "kind": kind, "recall_target": asked.recall, **found}
                row["changed"] = asked.changed
                row |= facts | {"peak_gib": round(peak, 3), **run_facts()}
                key = ("items", "kind", "recall_target", "changed")
                rows = [r for r in rows if any(r.get(n, 0) != row[n] for n in key)] + [row]
                print({name: row[name] for name in row if name != "versions"}, flush=True)
                asked.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def write_vectors(folder: Path, num_items: int, num_queries: int) -> None:
    """Write `items.npy` in blocks, and twice as many queries as are measured: half are for
    tuning.
    """
    rng = np.random.default_rng(0)
    scale_D = (1 / np.sqrt(np.arange(1, WIDTH + 1))).astype(np.float32)
    centre_CD = scale_D * rng.standard_normal((CLUSTERS, WIDTH), dtype=np.float32)
    shape = (num_items, WIDTH)
    items = np.lib.format.open_memmap(folder / "items.npy", "w+", np.float32, shape)
    for start in range(0, num_items, BLOCK):
        size = min(BLOCK, num_items - start)
        own_ND = centre_CD[rng.integers(0, CLUSTERS, size)]
        own_ND += 0.7 * scale_D * rng.standard_normal((size, WIDTH), dtype=np.float32)
        items[start : start + size] = own_ND * rng.normal(1, 0.15, (size, 1))
    tastes_QD = centre_CD[rng.integers(0, CLUSTERS, (2 * num_queries, 3))].mean(axis=1)
    noise_QD = scale_D * rng.standard_normal(tastes_QD.shape, dtype=np.float32)
    np.save(folder / "queries.npy", (1.5 * tastes_QD + 0.5 * noise_QD).astype(np.float32))


def built(folder: Path, kind: IndexChoice, recall: float) -> dict[str, Any]:
    """Build an index of the vectors and save it."""
    vectors_ND = torch.from_numpy(np.load(folder / "items.npy", mmap_mode="c"))
    query_QD = torch.from_numpy(np.load(folder / "queries.npy"))
    started = time.process_time()
    index = build_index(
        vectors_ND,
        kind=kind,
        known_I=torch.ones(len(vectors_ND), dtype=torch.bool),
        recall_target=recall,
        query_QD=query_QD[len(query_QD) // 2 :],
    )
    seconds = time.process_time() - started
    (folder / "index").mkdir(exist_ok=True)
    index.save(folder / "index")
    sizes = {file.name: file.stat().st_size / 2**30 for file in (folder / "index").iterdir()}
    gib = sizes["index.faiss"] if kind != "exact" else 0.0
    return {
        "build_s": round(seconds, 1),
        "width": index.facts.search_width,
        "index_gib": round(gib, 3),
        "vectors_gib": round(vectors_ND.nbytes / 2**30, 3),
    }


def answers(folder: Path, num_queries: int, num_changed: int) -> dict[str, Any]:
    """Map the index, and search it and an exact one over the same vectors."""
    index, bound = load_index(folder / "index", is_verified=True), {}
    query_QD = torch.from_numpy(np.load(folder / "queries.npy"))[:num_queries]
    vectors_ND = torch.from_numpy(np.load(folder / "items.npy", mmap_mode="c"))
    every = torch.ones(len(vectors_ND), dtype=torch.bool)
    exact = build_index(vectors_ND, kind="exact", known_I=every)
    if num_changed:
        changing = ChangingIndex(index, query_QD=query_QD)
        item_M = torch.randperm(len(vectors_ND), generator=torch.Generator().manual_seed(1))
        bound = {"bound": changing.measured_bound()}
        index = ChangingIndex(index, bound=2 * num_changed)
        index.put(item_M[:num_changed], vectors_ND[item_M[:num_changed]])
    true_QK = exact.search(query_QD, K, exclude_BX=torch.empty(num_queries, 0).long()).item_BK
    none_10 = torch.empty(1, 0).long()
    for query_1D in query_QD.split(1):  # the map's pages are read once
        index.search(query_1D, K, exclude_BX=none_10)
    took, clock, shares = [], [], []
    for query_1D, true_1K in zip(query_QD.split(1), true_QK.split(1), strict=True):
        started = time.process_time(), time.perf_counter()
        found_1K = index.search(query_1D, K, exclude_BX=none_10).item_BK
        took.append(1e3 * (time.process_time() - started[0]))
        clock.append(1e3 * (time.perf_counter() - started[1]))
        shares.append(float(torch.isin(true_1K, found_1K).float().mean()))
    p50, p99 = np.percentile(took, [50, 99])
    return bound | {
        "recall": round(float(np.mean(shares)), 4),
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "p50_ms_on_the_clock": round(float(np.percentile(clock, 50)), 3),
        "p99_ms_on_the_clock": round(float(np.percentile(clock, 99)), 3),
    }


if __name__ == "__main__":
    main()
