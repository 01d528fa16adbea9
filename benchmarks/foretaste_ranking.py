"""foretaste's side of `neumf.py` and `deepfm.py`: one epoch per turn."""

from pathlib import Path

import polars as pl
import torch
from ranking_turns import PARTS, told
from turns import say, say_ready, wait_for_turn

import foretaste as ft
from foretaste.training.checkpoint import Epoch
from foretaste.training.objectives import RowsConfig


def main() -> None:
    wanted = told()
    torch.set_num_threads(wanted["threads"])
    split, features = read(Path(wanted["data"]), validated=wanted["auc"])
    drawn = wanted.get("negatives", 0)

    def tell(epoch: Epoch) -> None:
        turn = {"seconds": len(split.train) / epoch.events_per_second, "loss": epoch.loss}
        turn |= {} if epoch.validation is None else {"auc": epoch.validation}
        say({**turn, "rows": len(split.train) * (1 + drawn)})
        wait_for_turn()

    say_ready(["torch", "numpy"], precision=wanted["precision"])
    ft.fit(
        model(wanted),
        split,
        objective=RowsConfig(negatives=drawn),
        training=ft.TrainingConfig(
            epochs=1000,
            batch_events=wanted["batch_rows"] // (1 + drawn),
            learning_rate=wanted["learning_rate"],
            beta2=0.999,
            patience=None,
            device="cpu",
            precision=wanted["precision"],
        ),
        features=features,
        show=False,
        on_epoch=tell,
    )


def read(path: Path, *, validated: bool) -> tuple[ft.Split, ft.FeatureSchema | None]:
    """Return the rows and their context."""
    table = pl.read_csv(path, separator="\t")
    context = [name for name in table.columns if name not in ("user", "item", "label", "part")]
    labels = [name for name in table.columns if name == "label"]
    parts = [
        ft.read_interactions(
            rows.drop("part"), user="user", item="item", columns=labels, context=context
        )
        for code in range(len(PARTS))
        if len(rows := table.filter(part=code))
    ]
    fields = {name: ft.CategoricalField() for name in context}
    split = ft.given_split(
        parts[0], validation=parts[1] if validated else None, test=parts[-1]
    )  # a test part there must be; it is not looked at
    return split, ft.FeatureSchema(context=fields) if context else None


def model(wanted: dict) -> ft.NeuMFConfig | ft.DeepFMConfig:
    """Return the settings of the network."""
    if wanted["model"] == "neumf":
        return ft.NeuMFConfig(factors=wanted["dim"], num_layers=wanted["layers"])
    return ft.DeepFMConfig(
        task=ft.Task(name="click", column="label"),
        embedding_dim=wanted["dim"],
        hidden=wanted["hidden"],
        dropout=wanted["dropout"],
    )


if __name__ == "__main__":
    main()
