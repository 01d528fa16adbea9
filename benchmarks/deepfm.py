"""DeepFM on Frappe: training rows per second and seconds to a target AUC, against peers in one run.

    sh benchmarks/peers.sh recbole deepctr rechub
    python benchmarks/deepfm.py frappe/nfm-split --out benchmarks/results/deepfm.json

The rows have ten fields, user and app among them; the training negatives are drawn once and are the
same for all. Hidden layers and dropout are RecBole's defaults; BARS uses 400 400 400.
"""

from ranking_rates import arguments, report, run
from sequence_ml1m import at_start

from foretaste.data.sources.files import Files
from foretaste.data.sources.readers import read_frappe_rows

PEERS = {
    "recbole": "peer_recbole_ranking.py",
    "deepctr": "peer_deepctr_deepfm.py",
    "rechub": "peer_rechub_deepfm.py",
}
DIM = 10


def main() -> None:
    parser = arguments("DeepFM on Frappe against peers", PEERS, to=True)
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128, 128])
    parser.add_argument("--dropout", type=float, default=0.2)
    args, start = parser.parse_args(), at_start()
    told = {
        "model": "deepfm",
        "dim": DIM,
        "hidden": args.hidden,
        "dropout": args.dropout,
        "batch_rows": args.batch_rows,
    }
    results = run(args, PEERS, read_frappe_rows(Files(args.data)).events, told)
    hidden = "-".join(map(str, args.hidden))
    facts = f"10 fields, {hidden}, batches of {args.batch_rows:,}, {args.threads} threads"
    report(args, "deepfm", results, start=start, what="rows", work=f"DeepFM (Frappe, {facts})")


if __name__ == "__main__":
    main()
