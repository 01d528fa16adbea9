"""Models on events of another table: ids are matched, counted, or refused."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import foretaste as ft
from foretaste.cli.main import run as run_command
from foretaste.data.features import fit_features
from foretaste.data.graph import graph_of
from foretaste.errors import DataError
from foretaste.models.base import Model
from foretaste.models.catalogue import ModelConfig, build_model
from foretaste.training.trained import Translation, rows_in

NUM_USERS, NUM_ITEMS, LENGTH = 40, 30, 6
CLICK = ft.Task(name="click", column="click")
MODELS: list[ModelConfig] = [
    ft.PopularityConfig(),
    ft.ItemKNNConfig(),
    ft.EASEConfig(),
    ft.ImplicitALSConfig(factors=4),
    ft.MFConfig(embedding_dim=4),
    ft.TwoTowerConfig(embedding_dim=4),
    ft.LightGCNConfig(embedding_dim=4),
    ft.PinSageConfig(embedding_dim=4),
    ft.SASRecConfig(embedding_dim=4),
    ft.BERT4RecConfig(embedding_dim=4),
    ft.GMFConfig(factors=4),
    ft.NeuMFConfig(factors=4),
    ft.DeepFMConfig(task=CLICK),
    ft.DINConfig(task=CLICK),
    ft.SharedBottomConfig(tasks=(CLICK,)),
    ft.MMoEConfig(tasks=(CLICK,)),
    ft.TwoStageConfig(retriever=ft.ItemKNNConfig(), ranker=ft.GMFConfig(factors=4), candidates=7),
]
RANKERS = [config for config in MODELS if config.kind in ("gmf", "neumf", "deepfm", "din", "mmoe")]


def table(seed: int = 0) -> pl.DataFrame:
    """Users 100 to 139 and items 500 to 529, an event a minute, of whom an age is known."""
    rng = np.random.default_rng(seed)
    rows = [
        (100 + user, 500 + int(item), 1_700_000_000 + 60 * (LENGTH * user + place))
        for user in range(NUM_USERS)
        for place, item in enumerate(rng.permutation(NUM_ITEMS)[:LENGTH])
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "t"], orient="row")
    return frame.with_columns(
        click=pl.Series(rng.integers(2, size=len(frame)).astype(np.float32)),
        hour=pl.Series(rng.integers(24, size=len(frame)).astype(str)),
    )


def read(frame: pl.DataFrame, **changes: object) -> ft.Interactions:
    given = {"timestamp": "t", "columns": ["click"], "context": ["hour"], **changes}
    return ft.read_interactions(frame, **given)  # type: ignore[arg-type]


def split_of(frame: pl.DataFrame, **changes: object) -> ft.Split:
    return ft.leave_last_split(read(frame, **changes))


def more_rows(frame: pl.DataFrame, *, user: object = 1, item: object = 2) -> pl.DataFrame:
    """The same events, preceded by one user and one item of their own.

    Each row number of the others is one more then, and no split holds the new ones out.
    """
    first = frame.head(1).with_columns(
        pl.lit(user).cast(frame["user_id"].dtype).alias("user_id"),
        pl.lit(item).cast(frame["item_id"].dtype).alias("item_id"),
    )
    return pl.concat([first, frame])


def made(config: ModelConfig, split: ft.Split, features: ft.Features | None = None) -> ft.Trained:
    """A model of random weights, which scores every user and item differently."""
    torch.manual_seed(0)
    events = split.train
    graph = graph_of(events, config.graph) if hasattr(config, "graph") else None
    sizes = {"num_users": events.num_users, "num_items": events.num_items}
    model = build_model(config, **sizes, graph=graph, features=features)
    for part in model.children() if isinstance(config, ft.TwoStageConfig) else (model,):
        assert isinstance(part, Model)
        part.begin(events)
        if part.learns_by == "events":
            part.learn(events)
        part.learn_new_users(events)
        part.finish()
    return ft.Trained(config=config, model=model.eval(), events=events, features=features, seed=0)


OWN = split_of(table())
OTHER = split_of(more_rows(table()))


# --- the same events under other rows give the same figures ---------------------------------------


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.kind)
def test_lists_of_the_same_events_under_other_rows_are_worth_the_same(config: ModelConfig) -> None:
    model = made(config, OWN)
    own = ft.evaluate(model, OWN.test, k=(3, 10), resamples=0)
    other = ft.evaluate(model, OTHER.test, k=(3, 10), resamples=0)
    accuracy = [name for name in own.metrics if name.startswith(("ndcg", "mrr", "recall"))]
    for name in accuracy:
        assert other.metrics[name] == pytest.approx(own.metrics[name], abs=1e-6)
    assert own.metrics["ndcg_at_10"] > 0
    assert other.counts["catalogue"] == own.counts["catalogue"]
    assert (other.counts["unknown_users"], other.counts["unknown_items"]) == (0, 0)
    assert "unknown_users" not in own.counts


@pytest.mark.parametrize("sampled", [None, ft.SampledNegatives(num=5)], ids=["plain", "sampled"])
@pytest.mark.parametrize("config", RANKERS, ids=lambda config: config.kind)
def test_rows_of_the_same_events_under_other_rows_are_judged_the_same(config, sampled) -> None:
    model = made(config, OWN)
    own = ft.evaluate_rows(model, OWN, resamples=0, sampled=sampled)
    other = ft.evaluate_rows(model, OTHER, resamples=0, sampled=sampled)
    assert other.counts["rows"] == own.counts["rows"]
    if sampled is None:
        assert own.label_NT.tolist() == other.label_NT.tolist()
        np.testing.assert_allclose(own.prediction_NT, other.prediction_NT, atol=1e-6)


def test_gates_of_the_same_events_under_other_rows_are_the_same() -> None:
    model = made(ft.MMoEConfig(tasks=(CLICK,)), OWN)
    own, other = ft.read_gates(model, OWN), ft.read_gates(model, OTHER)
    np.testing.assert_allclose(own.mean_TE, other.mean_TE, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"sampled": ft.SampledNegatives(num=NUM_ITEMS - 7)},
        {"exclude_seen": False},
        {"among": "cold"},
    ],
    ids=str,
)
def test_every_way_of_measuring_finds_users_by_their_ids(options: dict[str, object]) -> None:
    # with all but one of the items that can be drawn, chance hardly matters
    frame = table().filter(pl.col("item_id") != 505)
    cold = frame.with_columns(
        pl.when((pl.col("t") // 60 % LENGTH == LENGTH - 1) & (pl.col("user_id") < 110))
        .then(505)
        .otherwise("item_id")
        .alias("item_id")
    )
    own, other = split_of(cold), split_of(more_rows(cold))
    model = made(ft.ItemKNNConfig(), own)
    one = ft.evaluate(model, own.test, k=(5,), resamples=0, **options)  # type: ignore[arg-type]
    two = ft.evaluate(model, other.test, k=(5,), resamples=0, **options)  # type: ignore[arg-type]
    assert one.metrics.keys() == two.metrics.keys()
    (name,) = (name for name in one.metrics if name.startswith("ndcg"))
    assert two.metrics[name] == pytest.approx(one.metrics[name], abs=0.02)


def test_integers_are_found_among_texts_by_their_plain_digits() -> None:
    texts = more_rows(table().with_columns(pl.col("user_id", "item_id").cast(pl.String)), user="x")
    model, other = made(ft.MFConfig(embedding_dim=4), OWN), split_of(texts)
    assert not other.events.users.is_integer
    own = ft.evaluate(model, OWN.test, resamples=0).metrics["ndcg_at_10"]
    assert ft.evaluate(model, other.test, resamples=0).metrics["ndcg_at_10"] == pytest.approx(own)


def test_rows_are_found_by_ids() -> None:
    def of(*ids: object) -> ft.Vocabulary:
        return ft.Vocabulary(pl.Series(ids))

    assert rows_in(of(5, 7, 9), of(9, 8, 5)).tolist() == [2, -1, 0]
    assert rows_in(of("5", "07", "x"), of(5, 7)).tolist() == [0, -1]
    assert rows_in(of(5, 7), of("7", "07", "x")).tolist() == [1, -1, -1]
    assert of(1, 2).same_as(of(1, 2))
    for other in (of(2, 1), of("1", "2"), of(1), of(1, 3)):
        assert not of(1, 2).same_as(other)


def test_the_same_ids_cost_no_translation() -> None:
    again = read(table())
    assert again.users is not OWN.events.users
    assert Translation.of(OWN.events, again) is None
    model = made(ft.PopularityConfig(), OWN)
    assert model.asked_by(again) is model


# --- what the model does not know -----------------------------------------------------------------


def test_unknown_users_are_new_ones_and_unknown_items_are_misses_and_both_are_counted() -> None:
    frame = table()
    renamed = frame.with_columns(
        pl.when(pl.col("user_id") < 110).then(pl.col("user_id") + 1000).otherwise("user_id"),
        pl.when(pl.col("item_id") < 503).then(pl.col("item_id") + 1000).otherwise("item_id"),
    )
    model, split = made(ft.ItemKNNConfig(), OWN), split_of(renamed)
    report = ft.evaluate(model, split.test, k=(10,), resamples=0)
    targets = split.events.items.ids.gather(split.test.target_item)
    assert report.counts["unknown_users"] == 10
    assert report.counts["unknown_items"] == (targets >= 1500).sum() > 0
    assert any("knows 30 of 40 users" in note for note in report.notes)
    found = report.per_user["recall_at_10"][(targets >= 1500).to_numpy()]
    assert found.tolist() == [0] * len(found)


def test_an_unknown_user_is_answered_by_the_history_alone() -> None:
    # the same histories of other people: item-kNN reads nothing else, and finds as much
    strangers = table().with_columns(pl.col("user_id") + 1000)
    model = made(ft.ItemKNNConfig(), OWN)
    own = ft.evaluate(model, OWN.test, resamples=0).metrics
    other = ft.evaluate(model, split_of(strangers).test, resamples=0)
    assert other.metrics["ndcg_at_10"] == pytest.approx(own["ndcg_at_10"])
    assert other.counts["unknown_users"] == NUM_USERS


def test_rows_of_unknown_items_are_left_out_and_counted() -> None:
    renamed = table().with_columns(
        pl.when(pl.col("item_id") < 503).then(pl.col("item_id") + 1000).otherwise("item_id")
    )
    model, split = made(ft.DINConfig(task=CLICK), OWN), split_of(renamed)
    report = ft.evaluate_rows(model, split, resamples=0)
    unknown = (split.events.items.ids.gather(split.test.target_item) >= 1500).sum()
    assert report.counts["unknown_items"] == unknown > 0
    assert report.counts["rows"] == NUM_USERS - unknown


def test_features_of_an_unknown_user_are_those_of_the_other_table() -> None:
    model = made(TOWER, *aged(0))
    strangers, _ = aged(7000)
    own = ft.evaluate(model, aged(0)[0].test, resamples=0).metrics["ndcg_at_10"]
    other = ft.evaluate(model, strangers.test, resamples=0)
    assert other.counts["unknown_users"] == NUM_USERS
    assert other.metrics["ndcg_at_10"] == pytest.approx(own)
    assert ft.evaluate(model, aged(7001)[0].test, resamples=0).metrics["ndcg_at_10"] != own


TOWER = ft.TwoTowerConfig(embedding_dim=4, user_id=False)
AGE = ft.FeatureSchema(user={"age": ft.CategoricalField()})


def aged(shift: int, frame: pl.DataFrame | None = None) -> tuple[ft.Split, ft.Features]:
    """The same events of users whose ids are greater; one's age is the remainder by 7."""
    ids = range(100 + shift, 100 + shift + NUM_USERS)
    ages = pl.DataFrame({"user_id": ids, "age": [str(n % 7) for n in ids]})
    frame = table() if frame is None else frame
    split = split_of(frame.with_columns(pl.col("user_id") + shift), users=ages)
    return split, fit_features(AGE, split.train)


def evaluate_rows(model: ft.Trained, split: ft.Split) -> object:
    return ft.evaluate_rows(model, split, resamples=0)


def evaluate(model: ft.Trained, split: ft.Split) -> object:
    return ft.evaluate(model, split.test, resamples=0)


MMOE = ft.MMoEConfig(tasks=(CLICK,))
RECIPE = ft.parse_settings(
    ft.ExperimentConfig,
    {
        "data": {"kind": "public", "name": "ml-100k"},
        "split": {"kind": "leave_last"},
        "model": MMOE.model_dump(),
    },
    source="a test",
)


def read_gates(model: ft.Trained, split: ft.Split) -> object:
    return ft.read_gates(model, split)


def evaluate_split(model: ft.Trained, split: ft.Split) -> object:
    return ft.evaluate_split(model, RECIPE, split)


MEASURES = [evaluate, evaluate_rows, read_gates, evaluate_split]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"item_id": pl.col("item_id") + 1000}, "item"),
        ({"item_id": "sku-" + pl.col("item_id").cast(pl.String)}, "item"),
        ({"user_id": "u-" + pl.col("user_id").cast(pl.String)}, "user"),
    ],
)
def test_what_would_mean_nothing_is_refused(measure, change, column: str) -> None:
    with pytest.raises(DataError) as caught:
        measure(made(MMOE, OWN), split_of(table().with_columns(**change)))
    assert caught.value.column == column


# --- what training saw ----------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("other_rows", [False, True], ids=["own rows", "other rows"])
@pytest.mark.parametrize("timed", [True, False], ids=["times", "no times"])
def test_a_test_that_was_trained_on_is_refused(measure, *, other_rows: bool, timed: bool) -> None:
    changes = {} if timed else {"timestamp": None}
    frame = table() if timed else table().drop("t")
    whole = split_of(frame, **changes)
    all_of_it = replace(whole, part_E=np.zeros_like(whole.part_E))
    model = made(MMOE, all_of_it)
    asked = split_of(more_rows(frame) if other_rows else frame, **changes)
    with pytest.raises(DataError, match=r"trained on 40 of the 40 events") as caught:
        measure(model, asked)
    assert (caught.value.name, caught.value.value) == ("test", 40)


def test_the_validation_part_is_refused_after_a_refit_and_the_test_part_is_not() -> None:
    model = made(ft.ItemKNNConfig(), OWN.refit())
    report = ft.evaluate(model, OWN.test, resamples=0)
    assert "trained_on" not in report.counts
    with pytest.raises(DataError, match="trained on 40 of the 40"):
        ft.evaluate(model, OWN.validation, resamples=0)


def test_some_events_that_were_trained_on_are_counted() -> None:
    part_E = OWN.part_E.copy()
    part_E[np.flatnonzero(part_E == 2)[:7]] = 0
    model = made(ft.ItemKNNConfig(), replace(OWN, part_E=part_E))
    report = ft.evaluate(model, OWN.test, resamples=0)
    assert report.counts["trained_on"] == 7
    assert any("7 of 40 events of the test" in note for note in report.notes)


def test_a_user_who_does_an_item_again_was_not_trained_on_the_second_time() -> None:
    frame = table().with_columns(
        item_id=pl.when(pl.col("t") // 60 % LENGTH == LENGTH - 1)
        .then(pl.col("item_id").first().over("user_id"))
        .otherwise("item_id")
    )
    for changes in ({}, {"timestamp": None}):
        split = split_of(frame if not changes else frame.drop("t"), **changes)
        model = made(ft.ItemKNNConfig(), split)
        report = ft.evaluate(model, split.test, resamples=0, exclude_seen=False)
        assert "trained_on" not in report.counts


def test_users_that_the_model_knows_are_not_measured_as_new_ones() -> None:
    # the other file begins later: it has nothing of the users that the model was trained on
    later = table(seed=1).with_columns(pl.col("t") + 86_400)
    strangers = later.with_columns(pl.col("user_id") + 1000)
    model = made(ft.PopularityConfig(), OWN)
    for frame, known in ((later, True), (pl.concat([later, strangers]), False)):
        split = ft.cold_users_split(read(frame), validation=0.1, test=0.5)
        if known:
            with pytest.raises(DataError) as caught:
                ft.evaluate(model, split.test, users="new", resamples=0)
            assert (caught.value.name, caught.value.value) == ("users", "new")
        else:
            report = ft.evaluate(model, split.test, users="new", resamples=0)
            assert any("are not new to it" in note for note in report.notes)


def test_training_rows_are_judged_and_not_calibrated_on() -> None:
    report = ft.evaluate_rows(made(MMOE, OWN), OWN, part="train", resamples=0)
    assert "trained_on" not in report.counts
    with pytest.raises(DataError, match='part="validation"'):
        ft.calibrate(report, "platt")


def test_a_run_on_other_events_is_not_gone_on_with(tmp_path: Path) -> None:
    def run(split: ft.Split, **changes: object) -> ft.Trained:
        config = ft.MFConfig(embedding_dim=4)
        return ft.fit(
            config,
            split,
            training=ONE_EPOCH,
            folder=tmp_path,
            show=False,
            **changes,  # type: ignore[arg-type]
        )

    run(OWN)
    run(OWN, resume=True)
    renamed = split_of(table().with_columns(pl.col("user_id") + 1000))
    with pytest.raises(ft.ConfigError) as caught:
        run(renamed, resume=True)
    assert caught.value.name == "resume"


def test_the_command_line_measures_a_bundle_on_another_file_by_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    ft.build_recommender(made(ft.ItemKNNConfig(), OWN)).save(bundle)
    more_rows(table()).write_csv(tmp_path / "other.csv")
    recipe = tmp_path / "other.toml"
    recipe.write_text(
        '[data]\nkind = "files"\nfiles = ["other.csv"]\ntimestamp = "t"\n'
        '[split]\nkind = "leave_last"\n[model]\nkind = "item_knn"\n'
    )
    with contextlib.suppress(SystemExit):
        run_command(
            [
                "evaluate",
                str(bundle),
                "--recipe",
                str(recipe),
                "--data-dir",
                str(tmp_path),
                "--json",
            ]
        )
    told = json.loads(capsys.readouterr().out)
    own = ft.evaluate(made(ft.ItemKNNConfig(), OWN), OWN.test, resamples=0)
    assert told["counts"]["unknown_users"] == 0
    assert told["metrics"]["ndcg_at_10"] == pytest.approx(own.metrics["ndcg_at_10"])


# --- reports --------------------------------------------------------------------------------------


def test_reports_of_two_models_are_compared_by_the_users_of_the_holdout() -> None:
    # one model knows the holdout's rows, the other was trained under other rows
    first, second = made(ft.ItemKNNConfig(), OWN), made(ft.ItemKNNConfig(), OTHER)
    reports = [ft.evaluate(model, OWN.test, resamples=0) for model in (first, second)]
    found = ft.compare(*reports, "ndcg_at_10", resamples=10)
    assert found.users == NUM_USERS
    assert abs(found.difference) < 0.05


def test_reports_of_other_people_are_not_compared_by_their_rows() -> None:
    others = split_of(table().with_columns(pl.col("user_id") + 1000))
    lists = [ft.evaluate(made(ft.ItemKNNConfig(), s), s.test, resamples=0) for s in (OWN, others)]
    with pytest.raises(DataError, match="different holdouts"):
        ft.compare(*lists, "ndcg_at_10")
    rows = [ft.evaluate_rows(made(MMOE, s), s, resamples=0) for s in (OWN, others)]
    with pytest.raises(DataError, match="different holdouts"):
        ft.compare_rows(*rows, "auc")
    with pytest.raises(DataError, match="different holdouts"):
        ft.transfer({"both": rows[:1]}, {"click": rows[1:]})


# --- features and models that were fitted elsewhere -----------------------------------------------


def test_features_that_were_fitted_to_other_events_are_encoded_for_these() -> None:
    _, elsewhere = aged(0, more_rows(table(), user=101 - 7, item=2))
    split, own = aged(0)
    fitted = elsewhere.for_training(split.train)
    assert own.user_table is not None
    assert fitted.user_table is not None
    assert elsewhere.user_table is not None
    assert len(elsewhere.user_table) == NUM_USERS + 1
    names = {age: code for code, age in enumerate(sorted(str(n) for n in range(7)))}
    ages = [str(n % 7) for n in split.events.users.ids]
    order = [fitted.user_table.code_RC[row, 0].item() for row in range(NUM_USERS)]
    assert len({(names[age], code) for age, code in zip(ages, order, strict=True)}) == 7
    trained = ft.fit(TOWER, split, features=elsewhere, training=ONE_EPOCH, show=False)
    assert trained.features is not None
    assert trained.features.events is trained.events


def test_features_of_the_same_events_are_taken_as_they_are() -> None:
    split, features = aged(0)
    assert features.for_training(split.train) is features
    again = features.for_training(split.refit().train)
    assert again.user_table is features.user_table


def test_the_context_of_other_events_of_equal_number_is_encoded_for_these() -> None:
    schema = ft.FeatureSchema(context={"hour": ft.CategoricalField()})
    first, second = (ft.random_split(read(table()), seed=seed) for seed in (0, 1))
    assert len(first.train) == len(second.train)
    elsewhere = fit_features(schema, first.train)
    assert elsewhere.context is not None
    context = elsewhere.for_training(second.train).context_table
    assert context is not None
    expected = elsewhere.context.encode(second.train.context)
    assert torch.equal(context.code_RC, expected.code_RC)


@pytest.mark.parametrize("column", ["age", "hour"])
def test_features_whose_columns_the_events_lack_are_refused_by_name(column: str) -> None:
    _, features = aged(0)
    if column == "hour":
        schema = ft.FeatureSchema(context={"hour": ft.CategoricalField()})
        features = fit_features(schema, OWN.train)
    bare = ft.leave_last_split(read(table(), context=[]))
    with pytest.raises(ft.ConfigError, match=column):
        ft.fit(TOWER, bare, features=features, show=False)


def test_a_context_that_the_model_reads_and_other_events_lack_is_refused_by_name() -> None:
    schema = ft.FeatureSchema(context={"hour": ft.CategoricalField()})
    features = fit_features(schema, OWN.train)
    model = made(MMOE, OWN, features)
    later = table().with_columns(pl.col("t") + 1)  # of the same users and items
    for measure in (evaluate, evaluate_rows):
        for other in (more_rows(table()), later):
            with pytest.raises(DataError) as caught:
                measure(model, split_of(other, context=[]))
            assert caught.value.column == "hour"
        measure(model, OTHER)  # has it


def test_queries_of_other_events_have_no_scores() -> None:
    model = made(ft.ItemKNNConfig(), OWN)
    more = pl.concat([table(), table().with_columns(pl.col("user_id") + 9000)])
    test = split_of(more).test
    with pytest.raises(DataError, match="to other events") as caught:
        model.score(test.queries([len(test) - 1]))  # type: ignore[arg-type]
    assert caught.value.name == "queries"


def test_features_of_new_users_that_the_other_events_lack_are_said() -> None:
    model = made(TOWER, *aged(0))
    strangers = split_of(table().with_columns(pl.col("user_id") + 7000))
    report = ft.evaluate(model, strangers.test, resamples=0)
    assert any("age is missing" in note for note in report.notes)


ONE_EPOCH = ft.TrainingConfig(epochs=1, patience=None, device="cpu")


def test_models_of_other_users_or_items_are_not_joined() -> None:
    retriever = made(ft.ItemKNNConfig(), OWN)
    ranker = made(ft.GMFConfig(factors=4), OTHER)
    with pytest.raises(DataError) as caught:
        ft.two_stage(retriever, ranker)
    assert caught.value.name == "users"
    candidates = ft.Candidates(retriever=retriever)
    with pytest.raises(DataError) as caught:
        ft.fit(ft.GMFConfig(), OTHER, candidates=candidates, training=ONE_EPOCH, show=False)
    assert caught.value.name == "users"
    with pytest.raises(ft.ConfigError, match="other items"):
        ft.build_recommender(retriever, fallback=made(ft.PopularityConfig(), OTHER))


def test_models_whose_features_were_fitted_apart_are_not_joined() -> None:
    split, features = aged(0)
    frame = pl.DataFrame({"user_id": split.events.users.ids, "age": ["x", "y", *["z"] * 38]})
    other = fit_features(AGE, split_of(table(), users=frame).train)
    retriever = made(TOWER, split, features)
    with pytest.raises(ft.ConfigError) as caught:
        ft.two_stage(retriever, made(MMOE, split, other))
    assert caught.value.name == "user"
    ft.two_stage(retriever, made(MMOE, split, fit_features(AGE, split.train)))
