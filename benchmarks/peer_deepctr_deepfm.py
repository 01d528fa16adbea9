"""DeepCTR-Torch's side of `deepfm.py`: one epoch per turn, with its own `fit`."""

import torch
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM
from ranking_turns import PARTS, read_table, take_turns, told
from sklearn.metrics import roc_auc_score


def main() -> None:
    wanted = told()
    torch.set_num_threads(wanted["threads"])
    tables = [read_table(wanted["data"], part) for part in PARTS]
    labels = [table.pop("label") for table in tables]
    train, valid, _ = tables
    fields = [
        SparseFeat(name, 1 + max(int(table[name].max()) for table in tables), wanted["dim"])
        for name in train
    ]
    model = DeepFM(
        fields,
        fields,
        dnn_hidden_units=wanted["hidden"],
        dnn_dropout=wanted["dropout"],
        l2_reg_linear=0,
        l2_reg_embedding=0,
    )
    model.compile(
        torch.optim.Adam(model.parameters(), wanted["learning_rate"]), "binary_crossentropy"
    )

    def epoch() -> float:
        size = wanted["batch_rows"]
        told = model.fit(train, labels[0], batch_size=size, epochs=1, verbose=0, shuffle=True)
        return told.history["loss"][-1]

    take_turns(
        epoch,
        rows=len(labels[0]),
        packages=["torch", "numpy", "deepctr-torch"],
        auc=(lambda: roc_auc_score(labels[1], model.predict(valid, wanted["batch_rows"])[:, 0]))
        if wanted["auc"]
        else None,
    )


if __name__ == "__main__":
    main()
