"""NeuMF on ML-1M: training pairs per second, against RecBole in one run.

    sh benchmarks/peers.sh recbole
    python benchmarks/neumf.py ml-1m/ncf --out benchmarks/results/neumf.json

The pairs are those of NCF's authors; each observed pair has four drawn ones, which are counted too.
Both have vectors of 32 for GMF and 64 for MLP, and hidden layers of 128, 64 and 32.
"""

import polars as pl
from ranking_rates import arguments, report, run
from sequence_ml1m import at_start

from foretaste.data.sources.files import Files
from foretaste.data.sources.readers import read_ncf

PEERS = {"recbole": "peer_recbole_ranking.py"}
NEGATIVES, FACTORS, LAYERS = 4, 32, 3


def main() -> None:
    parser = arguments("NeuMF on ML-1M against RecBole", PEERS, to=False)
    parser.add_argument("--batch-pairs", type=int, default=5120, help="drawn ones counted in")
    args, start = parser.parse_args(), at_start()
    rows = read_ncf(Files(args.data)).events.filter(pl.col("part").is_in([0, 2]))
    told = {
        "model": "neumf",
        "negatives": NEGATIVES,
        "dim": FACTORS,
        "layers": LAYERS,
        "hidden": [FACTORS * 2**place for place in reversed(range(LAYERS))],
        "batch_rows": args.batch_pairs,
    }
    results = run(args, PEERS, rows, told)
    facts = f"{FACTORS} factors, batches of {args.batch_pairs:,}, {args.threads} threads"
    report(args, "neumf", results, start=start, what="pairs", work=f"NeuMF (ML-1M, {facts})")


if __name__ == "__main__":
    main()
