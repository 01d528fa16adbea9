"""SASRec on ML-1M: seconds per epoch, and to a quality, against RecTools, in one run.

    sh benchmarks/peers.sh rectools
    python benchmarks/sasrec_ml1m.py ml-1m.txt.gz --epochs 5 --out benchmarks/results/sasrec.json
    python benchmarks/sasrec_ml1m.py ml-1m.txt.gz --to 0.17 --epochs 60 --evaluate-every 2

`sequence_ml1m.py` describes the measurement.
"""

from sequence_ml1m import main

if __name__ == "__main__":
    main("sasrec")
