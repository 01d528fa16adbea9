"""Losses and answers of earlier versions, to the last digit: a refactoring must not change them.

`golden/losses.json` holds the settings of each case, all of them, and the first 20 losses with
them, in 64 bits. `golden/format-1/` holds a bundle of every kind as the first format was written,
and `answers.json` beside them what each answered. A case that is missing is added by
`python tests/test_golden.py`; one that is there is never written again by it: to change one,
delete it first, and say why in the commit.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import foretaste as ft
from foretaste.data.features_schema import CategoricalField, MultiField, NumericField, VectorField
from foretaste.data.folder import read_manifest, seal
from foretaste.errors import BundleError
from foretaste.experiment.two_stage import FirstStage
from foretaste.models.catalogue import ModelConfig, as_written
from foretaste.serving.bundle import BundleManifest
from foretaste.training.objectives import ObjectiveConfig

GOLDEN = Path(__file__).parent / "golden"
LOSSES, BUNDLES = GOLDEN / "losses.json", GOLDEN / "format-1"
ANSWERS = BUNDLES / "answers.json"
NUM_LOSSES = 20
MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)
OBJECTIVE: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)

SCHEMA = ft.FeatureSchema(
    user={"job": CategoricalField(), "age": NumericField()},
    item={
        "genre": CategoricalField(),
        "tags": MultiField(),
        "price": NumericField(),
        "picture": VectorField(),
    },
    context={"hour": CategoricalField()},
)
TASKS = (
    ft.Task(name="click", column="click"),
    ft.Task(name="stars", column="stars", kind="regression"),
)


def make_split() -> ft.Split:
    """Return 60 users of five groups, who do six of their group's eight items; 40 items."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{user % 5 * 8 + item}", 1000 * user + place)
        for user in range(60)
        for place, item in enumerate(rng.permutation(8)[:6].tolist())
    ]
    events = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").with_columns(
        click=pl.Series(rng.integers(0, 2, len(rows))),
        stars=pl.Series(rng.integers(1, 6, len(rows))),
        hour=pl.Series([f"h{hour}" for hour in rng.integers(0, 4, len(rows))]),
    )
    users = pl.DataFrame(
        {
            "user": [f"u{user}" for user in range(60)],
            "job": [f"j{user % 7}" for user in range(60)],
            "age": rng.integers(15, 80, 60).astype(float),
        }
    )
    items = pl.DataFrame(
        {
            "item": [f"i{item}" for item in range(40)],
            "genre": [f"g{item // 8}" for item in range(40)],
            "tags": [[f"t{item % 3}", f"t{item % 4}"][: item % 3] for item in range(40)],
            "price": rng.random(40),
            "picture": rng.normal(size=(40, 3)).tolist(),
        }
    )
    return ft.leave_last_split(
        ft.read_interactions(
            events,
            user="user",
            item="item",
            timestamp="time",
            columns=["click", "stars"],
            context=["hour"],
            users=users,
            items=items,
            user_key="user",
            item_key="item",
        )
    )


def settings(
    model: ModelConfig,
    objective: ObjectiveConfig | None = None,
    *,
    first_objective: ObjectiveConfig | None = None,
    features: bool = False,
    index: str = "auto",
    **training: Any,
) -> dict[str, Any]:
    """Return all settings of a case, as JSON."""
    usual: dict[str, Any] = {
        "epochs": 7,
        "batch_events": 64,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "validate_every": 100,
        "patience": None,
        "device": "cpu",
    }
    return {
        "model": model.model_dump(mode="json"),
        "objective": None if objective is None else objective.model_dump(mode="json"),
        "first_objective": first_objective and first_objective.model_dump(mode="json"),
        "training": ft.TrainingConfig(**{**usual, **training}).model_dump(mode="json"),
        "features": features,
        "index": index,
    }


def learn(case: Mapping[str, Any], split: ft.Split, folder: Path | None = None) -> ft.Trained:
    return ft.fit(
        MODEL.validate_python(as_written(case["model"])),
        split,
        training=ft.TrainingConfig(**case["training"]),
        objective=case["objective"] and OBJECTIVE.validate_python(case["objective"]),
        features=SCHEMA if case["features"] else None,
        first_stage=FirstStage(
            training=ft.TrainingConfig(**case["training"]),
            objective=OBJECTIVE.validate_python(case["first_objective"]),
        )
        if case["first_objective"]
        else None,
        folder=folder,
        show=False,
    )


@contextmanager
def in_64_bits() -> Iterator[None]:
    """Make new tensors of 64 bits, and let layers read 64 of what is kept in 32, as features are.

    `float()` widens too: it is there for 16 bits.
    """

    def widen(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in given
        )

    hook = register_module_forward_pre_hook(widen)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", Tensor.double)
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        hook.remove()


def losses_of(case: Mapping[str, Any], split: ft.Split, folder: Path) -> list[float]:
    """Return the first losses of a case, in 64 bits; of several models each has its share."""
    with in_64_bits():
        learn(case, split, folder)
    return first_losses(folder)


def first_losses(folder: Path) -> list[float]:
    """Return the losses that a run's logs begin with."""
    logs = sorted(folder.rglob("steps.jsonl"))
    kept = NUM_LOSSES // len(logs)
    lines = [line for log in logs for line in log.read_text().splitlines()[:kept]]
    return [json.loads(line)["loss"] for line in lines]


QUESTIONS: list[dict[str, Any]] = [
    {"user_id": "u3"},
    {"user_id": "u7", "history": ["i3", "i9", "i0", "i9"]},
    {"user_id": "stranger", "history": ["i12", "i30"]},
    {"user_id": None},
]
TOLD: list[dict[str, Any]] = [
    {"user_id": "u11", "context": {"hour": "h2"}},
    {"history": ["i8"], "features": {"job": "j1", "age": 33.0}, "context": {"hour": "h0"}},
]


def answers_of(recommender: ft.Recommender, case: Mapping[str, Any]) -> list[Any]:
    """Return what a recommender answers to all questions, as JSON."""
    config = case["model"]
    told = ("features", "context") if "context_features" in json.dumps(config) else ("features",)
    asked = [
        {name: value for name, value in question.items() if name in ("user_id", "history", *told)}
        for question in QUESTIONS + (TOLD if case["features"] else [])
    ]
    answers = [recommender.recommend(**question, k=6) for question in asked]
    if has_vectors(config):
        answers.append(recommender.similar("i5", k=4))
    return [
        {
            "source": answer.source,
            "item_ids": [row.item_id for row in answer.rows],
            "scores": [row.score for row in answer.rows],
        }
        for answer in answers
    ]


def has_vectors(config: Mapping[str, Any]) -> bool:
    return config["kind"] in ("sasrec", "bert4rec", "mf", "two_tower", "lightgcn", "pinsage", "als")


def cases() -> dict[str, dict[str, Any]]:
    """Return the cases, as they are today; those that are stored already are not made of these."""
    pairs = ft.PairsConfig(loss="sampled_softmax", negatives=12, l2=1e-4)
    rows = ft.RowsConfig(negatives=3)
    sequence = {"embedding_dim": 8, "max_len": 5}
    tasks: dict[str, Any] = {"tasks": TASKS, "embedding_dim": 6}
    told: dict[str, Any] = {"features": True}
    return {
        "sasrec": settings(ft.SASRecConfig(**sequence), ft.NextItemConfig()),
        "sasrec, modern": settings(
            ft.SASRecConfig(**sequence, block="modern"),
            ft.NextItemConfig(loss="gbce", negatives=9, row_negatives=2, windows="all"),
        ),
        "bert4rec": settings(
            ft.BERT4RecConfig(**sequence, output_projection=True, output_bias=True),
            ft.MaskedItemConfig(mask_ratio=0.4),
        ),
        "bert4rec, modern": settings(
            ft.BERT4RecConfig(**sequence, block="modern", hidden_ratio=1),
            ft.MaskedItemConfig(mask_ratio=0.4, loss="sampled_softmax", negatives=9),
        ),
        "hstu": settings(
            ft.HSTUConfig(**sequence), ft.NextItemConfig(loss="sampled_softmax", negatives=9)
        ),
        "mf": settings(ft.MFConfig(embedding_dim=8), pairs),
        "mf, biases and cosine": settings(
            ft.MFConfig(embedding_dim=8, biases=True, similarity="cosine", temperature=0.2),
            ft.PairsConfig(loss="bpr", negatives=0, row_negatives=3),
        ),
        "mf, all items": settings(
            ft.MFConfig(embedding_dim=8, dropout=0.2), ft.PairsConfig(loss="softmax")
        ),
        "mf, the batch and the popular": settings(
            ft.MFConfig(embedding_dim=8),
            ft.PairsConfig(
                loss="sampled_softmax",
                negatives=6,
                in_batch=True,
                popularity_power=0.5,
                exclude_known=True,
            ),
            gradient_clip=0.5,
            ema_decay=0.9,
        ),
        "mf, hard negatives": settings(
            ft.MFConfig(embedding_dim=8),
            ft.PairsConfig(
                loss="bce", negatives=6, hard_negatives=2, hard_from="index", hard_from_epoch=2
            ),
        ),
        "two_tower": settings(ft.TwoTowerConfig(embedding_dim=8), pairs),
        "two_tower, mean": settings(
            ft.TwoTowerConfig(embedding_dim=8, user_id=False, history="mean"), pairs
        ),
        "two_tower, attention and layers": settings(
            ft.TwoTowerConfig(
                embedding_dim=8,
                history="attention",
                reads="others",
                query_hidden=(12,),
                item_hidden=(12,),
                id_dropout=0.2,
            ),
            pairs,
        ),
        "two_tower, sasrec and cosine": settings(
            ft.TwoTowerConfig(
                embedding_dim=8,
                user_id=False,
                history="sasrec",
                num_blocks=1,
                max_len=5,
                similarity="cosine",
                temperature=0.2,
            ),
            ft.PairsConfig(loss="softmax"),
        ),
        "two_tower, features": settings(
            ft.TwoTowerConfig(embedding_dim=8, id_dropout=0.1), pairs, **told
        ),
        "lightgcn": settings(ft.LightGCNConfig(embedding_dim=8), pairs),
        "lightgcn, transformed": settings(
            ft.LightGCNConfig(embedding_dim=8, num_layers=2, transform=True), pairs
        ),
        "lightgcn, noise and contrast": settings(
            ft.LightGCNConfig(embedding_dim=8, noise=0.1, contrast_layer=1, edge_dropout=0.1),
            ft.PairsConfig(loss="bpr", negatives=0, row_negatives=1, contrast=0.1),
        ),
        "pinsage": settings(ft.PinSageConfig(embedding_dim=8), pairs),
        "pinsage, uniform": settings(
            ft.PinSageConfig(embedding_dim=8, neighbours="uniform", cold_share=0.1), pairs
        ),
        "pinsage, features": settings(ft.PinSageConfig(embedding_dim=8), pairs, **told),
        "gmf": settings(ft.GMFConfig(factors=4), rows),
        "mlp": settings(ft.MLPConfig(factors=4), rows),
        "neumf": settings(ft.NeuMFConfig(factors=4), rows),
        "neumf, pre-trained": settings(ft.NeuMFConfig(factors=4, pretrain=True), rows),
        "deepfm": settings(ft.DeepFMConfig(embedding_dim=6, hidden=(8,)), rows),
        "deepfm, features": settings(
            ft.DeepFMConfig(embedding_dim=6, hidden=(8,), l2=1e-3, id_dropout=0.1), rows, **told
        ),
        "shared_bottom": settings(
            ft.SharedBottomConfig(**tasks, bottom_hidden=(12,), tower_hidden=(), pooling="none"),
            ft.RowsConfig(),
            **told,
        ),
        "shared_bottom, mean of others": settings(
            ft.SharedBottomConfig(
                embedding_dim=6,
                bottom_hidden=(12,),
                tower_hidden=(),
                pooling="mean",
                reads="others",
            ),
            rows,
        ),
        "mmoe": settings(
            ft.MMoEConfig(**tasks, expert_hidden=(8,), pooling="none"), ft.RowsConfig()
        ),
        "mmoe, attention": settings(
            ft.MMoEConfig(**tasks, expert_hidden=(8,), pooling="attention"),
            ft.RowsConfig(weighting="uncertainty", negatives=0),
            **told,
        ),
        "mmoe, attention without ids of users": settings(
            ft.MMoEConfig(embedding_dim=6, expert_hidden=(8,), pooling="attention", user_id=False),
            rows,
        ),
        "din": settings(
            ft.DINConfig(embedding_dim=6, hidden=(8,), pooling="attention", l2=1e-3), rows
        ),
        "din, unnormalised and dice": settings(
            ft.DINConfig(
                embedding_dim=6,
                hidden=(8,),
                reads="others",
                weights="unnormalised",
                activation="dice",
                user_id=True,
                pooling="attention",
            ),
            ft.RowsConfig(negatives=3, negatives_from="popularity"),
            **told,
        ),
        "two_stage": settings(
            ft.TwoStageConfig(
                retriever=ft.MFConfig(embedding_dim=8),
                ranker=ft.DeepFMConfig(embedding_dim=6, hidden=(8,)),
                candidates=12,
            ),
            ft.RowsConfig(negatives=3, negatives_from="retriever", retriever_share=0.5),
            first_objective=pairs,
            **told,
        ),
        **{
            f"{name}, {tables}": settings(model, objective, tables=tables, features=features)
            for tables in ("lazy_adamw", "row_adagrad")
            for name, model, objective, features in (
                ("mf", ft.MFConfig(embedding_dim=8, biases=True), pairs, False),
                ("sasrec", ft.SASRecConfig(**sequence), ft.NextItemConfig(), False),
                ("pinsage", ft.PinSageConfig(embedding_dim=8), pairs, True),
                ("deepfm", ft.DeepFMConfig(embedding_dim=6, hidden=(8,), l2=1e-3), rows, True),
            )
        },
        "popularity": settings(ft.PopularityConfig()),
        "item_knn": settings(ft.ItemKNNConfig(neighbours=10)),
        "ease": settings(ft.EASEConfig(l2=10)),
        "als": settings(ft.ImplicitALSConfig(factors=6)),
        "mf in lists": settings(ft.MFConfig(embedding_dim=8), pairs, index="ivf_flat"),
        "mf in lists of bytes": settings(ft.MFConfig(embedding_dim=8), pairs, index="ivf_sq8"),
        "mf in a graph of items": settings(ft.MFConfig(embedding_dim=8), pairs, index="hnsw"),
    }


NO_LOSSES = ("popularity", "item_knn", "ease", "als")
YOUNGER = ("hstu",)
"""Than the first format of bundles."""
NO_BUNDLE = (
    *YOUNGER,
    *(f"{name}, lazy_adamw" for name in ("mf", "sasrec", "pinsage", "deepfm")),
    *(
        f"{name}, row_adagrad" for name in ("mf", "sasrec", "pinsage", "deepfm")
    ),  # and another of the same kind and of the same weights has one
    "mf, all items",
    "mf, the batch and the popular",
    "mf, hard negatives",
    "two_tower, sasrec and cosine",
    "lightgcn, noise and contrast",
    "pinsage, uniform",
    "neumf, pre-trained",
    "shared_bottom, mean of others",
    "mmoe, attention without ids of users",
    "din, unnormalised and dice",
)


def stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


@pytest.fixture(scope="module")
def split() -> ft.Split:
    return make_split()


@pytest.mark.parametrize("name", stored(LOSSES))
def test_a_case_has_the_losses_that_it_had(name: str, split: ft.Split, tmp_path: Path) -> None:
    case = stored(LOSSES)[name]
    assert losses_of(case, split, tmp_path) == pytest.approx(case["losses"], rel=1e-9, abs=0)


@pytest.mark.parametrize("name", stored(ANSWERS))
def test_a_bundle_of_the_first_format_answers_as_then(name: str, tmp_path: Path) -> None:
    expected = stored(ANSWERS)[name]
    zipfile.ZipFile(BUNDLES / f"{file_of(name)}.zip").extractall(tmp_path)
    found = answers_of(ft.load(tmp_path), expected)
    for answer, then in zip(found, expected["answers"], strict=True):
        assert answer["source"] == then["source"]
        assert answer["item_ids"] == then["item_ids"]
        assert answer["scores"] == pytest.approx(then["scores"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("then", "now", "wrong"),
    [
        ("users.weight", None, "user_table.weight"),
        ("users.weight", "people.weight", "user_table.weight"),
        (None, "extra.weight", "extra.weight"),
    ],
    ids=["missing", "renamed", "one too many"],
)
def test_a_bundle_of_the_first_format_whose_weights_are_others_names_one_and_stays_as_it_was(
    then: str | None, now: str | None, wrong: str, tmp_path: Path
) -> None:
    zipfile.ZipFile(BUNDLES / "mf.zip").extractall(tmp_path)
    file = tmp_path / "weights.safetensors"
    weights = load_file(file)
    moved = weights["items.weight"] if then is None else weights.pop(then)
    save_file(weights if now is None else {**weights, now: moved.clone()}, file)
    seal(tmp_path, read_manifest(tmp_path, BundleManifest))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BundleError) as caught:
        ft.load(tmp_path)
    assert caught.value.name == wrong
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def file_of(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def write(path: Path, entries: Mapping[str, Any]) -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Store what is not stored yet."""
    torch.set_num_threads(1)
    split, losses, answers = make_split(), stored(LOSSES), stored(ANSWERS)
    for name, case in cases().items():
        if name not in losses and name not in NO_LOSSES and case["index"] == "auto":
            with TemporaryDirectory() as folder:
                losses[name] = {**case, "losses": losses_of(case, split, Path(folder))}
        if name not in answers and name not in NO_BUNDLE:
            answers[name] = {**case, "answers": store_bundle(name, case, split)}
        write(LOSSES, losses)
        write(ANSWERS, answers)


def store_bundle(name: str, case: Mapping[str, Any], split: ft.Split) -> list[Any]:
    BUNDLES.mkdir(exist_ok=True)
    recommender = ft.build_recommender(learn(case, split), index=case["index"])
    with TemporaryDirectory() as folder:
        recommender.save(Path(folder) / "bundle")
        shutil.make_archive(str(BUNDLES / file_of(name)), "zip", Path(folder) / "bundle")
    return answers_of(recommender, case)


if __name__ == "__main__":
    main()
