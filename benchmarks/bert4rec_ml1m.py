"""BERT4Rec on ML-1M: seconds per epoch, and to a quality, against RecTools, in one run.

    sh benchmarks/peers.sh rectools
    python benchmarks/bert4rec_ml1m.py ml-1m.txt.gz --epochs 5 --out bert4rec.json
    python benchmarks/bert4rec_ml1m.py ml-1m.txt.gz --to 0.14 --epochs 200 --evaluate-every 5

Both hide the same share of each history's events (`--mask-ratio`); feed-forward layers are four
times as wide as states, which is RecTools' default. `sequence_ml1m.py` describes the measurement.
"""

from sequence_ml1m import main

if __name__ == "__main__":
    main("bert4rec")
