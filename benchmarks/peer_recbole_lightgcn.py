"""RecBole's side of `lightgcn.py`: one epoch of its LightGCN per turn, with its own trainer."""

import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightgcn_pairs import arguments, read_rows
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed
from turns import say, say_ready, wait_for_turn


def main() -> None:
    args = arguments("RecBole's LightGCN").parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    torch.set_num_threads(args.threads)
    users, items = read_rows(args.data)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pairs").mkdir()
        lines = "\n".join(f"{user}\t{item}" for user, item in zip(users, items, strict=True))
        head = "user_id:token\titem_id:token\n"
        (Path(folder) / "pairs" / "pairs.inter").write_text(head + lines + "\n")
        config = Config(
            model="LightGCN",
            dataset="pairs",
            config_dict={
                "data_path": folder,
                "load_col": {"inter": ["user_id", "item_id"]},
                "embedding_size": args.dim,
                "n_layers": args.layers,
                "reg_weight": 1e-4,
                "train_batch_size": args.batch_size,
                # nothing is held out: all pairs are trained on
                "eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}, "order": "RO", "mode": "full"},
                "use_gpu": False,
                "show_progress": False,
                "state": "ERROR",
            },
        )
        init_seed(config["seed"], config["reproducibility"])
        logging.getLogger().setLevel(logging.ERROR)
        dataset = create_dataset(config)
        train, _, _ = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset).to(config["device"])
    trainer = Trainer(config, model)
    say_ready(["torch", "recbole"], events=len(train.dataset))
    epoch = 0
    while True:
        begin = time.perf_counter()
        loss = trainer._train_epoch(train, epoch, show_progress=False)
        say({"seconds": time.perf_counter() - begin, "loss": float(loss)})
        epoch += 1
        wait_for_turn()


if __name__ == "__main__":
    main()
