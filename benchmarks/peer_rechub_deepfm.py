"""torch-rechub's side of `deepfm.py`: one epoch per turn, with its own trainer.

Its hidden layers always have batch normalisation, which is a little more work.
"""

import torch
from ranking_turns import PARTS, read_table, take_turns, told
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.ranking import DeepFM
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator


def main() -> None:
    wanted = told()
    torch.set_num_threads(wanted["threads"])
    tables = [read_table(wanted["data"], part) for part in PARTS]
    labels = [table.pop("label") for table in tables]
    fields = [
        SparseFeature(name, 1 + max(int(table[name].max()) for table in tables), wanted["dim"])
        for name in tables[0]
    ]
    network = {"dims": wanted["hidden"], "dropout": wanted["dropout"], "activation": "relu"}
    model = DeepFM(deep_features=fields, fm_features=fields, mlp_params=network)
    loader, valid, _ = DataGenerator(tables[0], labels[0]).generate_dataloader(
        tables[1], labels[1], tables[2], labels[2], batch_size=wanted["batch_rows"]
    )
    trainer = CTRTrainer(model, optimizer_params={"lr": wanted["learning_rate"]})
    take_turns(
        lambda: trainer.train_one_epoch(loader),
        rows=len(labels[0]),
        packages=["torch", "numpy", "torch-rechub"],
        auc=(lambda: trainer.evaluate(model, valid)) if wanted["auc"] else None,
    )


if __name__ == "__main__":
    main()
