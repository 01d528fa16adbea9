"""RecBole's side of `neumf.py` and `deepfm.py`: one epoch per turn, with its own trainer."""

import logging
import tempfile
from pathlib import Path

import torch
from ranking_turns import PARTS, read_table, take_turns, told
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed


def main() -> None:
    wanted = told()
    torch.set_num_threads(wanted["threads"])
    with tempfile.TemporaryDirectory() as folder:
        columns = write(Path(folder) / "rows", wanted["data"])
        config = Config(
            model={"neumf": "NeuMF", "deepfm": "DeepFM"}[wanted["model"]],
            dataset="rows",
            config_dict={
                "data_path": folder,
                "load_col": {"inter": columns},
                "learning_rate": wanted["learning_rate"],
                "train_batch_size": wanted["batch_rows"],
                "use_gpu": False,
                "show_progress": False,
                "state": "ERROR",
                **(neumf(wanted) if wanted["model"] == "neumf" else deepfm(wanted)),
            },
        )
        init_seed(config["seed"], config["reproducibility"])
        logging.getLogger().setLevel(logging.ERROR)
        train, valid, _ = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, get_model(config["model"])(config, train.dataset))
    epochs = iter(range(1000))
    take_turns(
        lambda: trainer._train_epoch(train, next(epochs), show_progress=False),
        rows=len(train.dataset) * (1 + wanted.get("negatives", 0)),
        packages=["torch", "numpy", "recbole"],
        auc=(lambda: trainer.evaluate(valid, load_best_model=False)["auc"])
        if wanted["auc"]
        else None,
    )


def write(folder: Path, data: str) -> list[str]:
    """Write the parts as RecBole's files, and return their columns."""
    folder.mkdir()
    for part in PARTS:
        table = read_table(data, part)
        kinds = {"user": "user_id:token", "item": "item_id:token", "label": "label:float"}
        head = [kinds.get(name, f"{name}:token") for name in table]
        rows = zip(*(column.tolist() for column in table.values()), strict=True)
        lines = ["\t".join(head), *("\t".join(map(str, row)) for row in rows)]
        (folder / f"rows.{part}.inter").write_text("\n".join(lines) + "\n")
    return [name.partition(":")[0] for name in head]


def neumf(wanted: dict) -> dict:
    return {
        "benchmark_filename": ["train", "test", "test"],
        "mf_embedding_size": wanted["dim"],
        "mlp_embedding_size": wanted["hidden"][0] // 2,
        "mlp_hidden_size": wanted["hidden"],
        "dropout_prob": 0.0,
        "train_neg_sample_args": {
            "distribution": "uniform",
            "sample_num": wanted["negatives"],
            "dynamic": False,
        },
    }


def deepfm(wanted: dict) -> dict:
    return {
        "benchmark_filename": list(PARTS),
        "embedding_size": wanted["dim"],
        "mlp_hidden_size": wanted["hidden"],
        "dropout_prob": wanted["dropout"],
        "train_neg_sample_args": None,
        "eval_args": {"mode": "labeled", "order": "RO"},
        "metrics": ["AUC"],
        "valid_metric": "AUC",
    }


if __name__ == "__main__":
    main()
