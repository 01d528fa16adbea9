"""Training data of the served model: `final`, its former name `refit`, splits without a test."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import foretaste as ft
from foretaste.cli.main import run as command
from foretaste.config import parse_settings
from foretaste.data.splits import TRAIN, UNUSED
from foretaste.errors import ConfigError, DataError, TooLargeError
from foretaste.experiment.recipe import override, recipe_of
from foretaste.experiment.run import Run, run_experiment, to_recommender
from foretaste.serving.metrics import Metrics
from foretaste.serving.service import Service
from foretaste.serving.slot import ModelSlot
from foretaste.serving.state import open_live_events
from foretaste.serving.versions import Versions
from foretaste.training.progress import Cost
from foretaste.training.trained import Trained
from tests.worlds import events_of, walks

USERS, ITEMS, EACH = 60, 30, 10
SASREC = {"kind": "sasrec", "embedding_dim": 8, "num_blocks": 1, "num_heads": 1, "max_len": 10}
CLICKS = {"kind": "gmf", "factors": 4, "task": {"name": "click", "column": "click"}}
TRAINING = {"epochs": 4, "learning_rate": 0.05, "warmup_steps": 0, "batch_events": 64}


def events(*, columns: tuple[str, ...] = ()) -> ft.Interactions:
    """Ten events of each user, of different items, at times of its own."""
    draw = np.random.default_rng(0)
    rows = [
        {"user": user, "item": int(item), "t": 1_600_000_000 + 1000 * place + user}
        for user in range(USERS)
        for place, item in enumerate(draw.choice(ITEMS, size=EACH, replace=False))
    ]
    frame = pl.DataFrame(rows).with_columns(click=(pl.col("t") + pl.col("item")) % 4 == 0)
    named = {"user": "user", "item": "item", "timestamp": "t"}
    return ft.read_interactions(frame, **named, columns=columns)


def recipe(**settings: object) -> ft.ExperimentConfig:
    usual = {
        "data": {"kind": "public", "name": "ml-100k"},
        "split": {"kind": "temporal"},
        "model": {"kind": "item_knn"},
        "training": TRAINING,
        "evaluation": {"k": [5]},
    }
    return parse_settings(ft.ExperimentConfig, {**usual, **settings}, source="test")


def done(**settings: object) -> tuple[Run, ft.Split, ft.ExperimentConfig]:
    config = recipe(**settings)
    of_clicks = config.model.kind == "gmf"
    split = ft.make_split(config.split, events(columns=("click",) if of_clicks else ()))
    return run_experiment(config, split, show=False), split, config


def offered_again(trained: Trained, whole: ft.Interactions) -> int:
    """Count recommended items that the user already has in its history."""
    recommender = ft.build_recommender(trained)
    rows = recommender.recommend_many(whole.users.ids.to_list(), k=10)
    users, items = (
        whole.users.ids[whole.user_idx.tolist()],
        whole.items.ids[whole.item_idx.tolist()],
    )
    had = pl.DataFrame({"user_id": users, "item_id": items})
    offered = rows.select("user_id", "item_id").explode("item_id")
    return len(offered.join(had, on=["user_id", "item_id"], how="semi"))


def test_a_model_that_learned_from_everything_has_every_event_and_offers_nothing_again() -> None:
    run, split, _ = done(final="all")
    trained, _ = run.final
    assert trained.events.fingerprint() == split.events.fingerprint()
    # The first run lacks the newest fifth, and recommends some of it: the test would show it.
    assert offered_again(run.trained, split.events) > 20
    assert offered_again(trained, split.events) == 0


@pytest.mark.parametrize(
    ("final", "parts", "learned_from"),
    [
        ("none", 1, "train"),
        ("validation", 2, "train and validation"),
        ("all", 3, "all events"),
    ],
)
def test_the_final_model_learns_from_as_much_as_is_asked(
    final: str, parts: int, learned_from: str
) -> None:
    run, split, config = done(final=final)
    trained, report = run.final
    assert len(trained.events) == int((split.part_E < parts).sum())
    assert trained.learned_from == learned_from
    assert (run.refitted is None) == (final == "none")
    assert (run.refitted_report is None) == (final != "validation")
    assert recipe_of(trained).final == final
    record = ft.record_run(run, config, recipe="run")
    assert record["metrics"] == dict(run.report.metrics)
    if final == "all":
        assert report.metrics == run.report.metrics
        assert report.lists is not None
        assert "and was not measured" in report.lists.notes[0]
        assert isinstance(again := record["refitted"], Mapping)
        assert (again["trained_on"], again["metrics"]) == (learned_from, {})


@pytest.mark.parametrize("final", ["validation", "all"])
@pytest.mark.parametrize("in_two_stages", [False, True])
def test_the_final_model_and_its_bundle_keep_the_recency_that_validation_chose(
    tmp_path: Path, final: str, *, in_two_stages: bool
) -> None:
    model: dict[str, object] = {"kind": "mf", "embedding_dim": 16}
    if in_two_stages:
        ranker = {"kind": "gmf", "factors": 4}
        model = {"kind": "two_stage", "retriever": model, "ranker": ranker, "candidates": 20}
    training = {"epochs": 10, "batch_events": 500}
    config = recipe(
        final=final,
        model=model,
        split={"kind": "leave_last"},
        training={"epochs": 1} if in_two_stages else training,
        **({"first_stage": {"training": training}} if in_two_stages else {}),
    )
    split = ft.make_split(config.split, events_of(walks(), num_items=60))
    run = run_experiment(config, split, show=False)
    to_recommender(*run.final).save(tmp_path / "bundle")
    loaded = ft.load(tmp_path / "bundle").trained
    chosen = run.trained.model.first_stage.recency
    assert chosen in (4, 16, 64)
    for trained in (run.refitted, loaded):
        kept = trained.config.retriever if in_two_stages else trained.config
        assert kept.recency == trained.model.first_stage.recency == chosen
        assert recipe_of(trained).model == config.model
    query = split.validation.queries(np.arange(20))
    answers = [each.model.first_stage.encode(query) for each in (run.refitted, loaded)]
    assert answers[0].equal(answers[1])


def test_the_final_model_trains_for_the_epochs_that_were_chosen(tmp_path: Path) -> None:
    config = recipe(final="all", model=SASREC, training={**TRAINING, "epochs": 6})
    split = ft.make_split(config.split, events())
    run = run_experiment(config, split, show=False, folder=tmp_path / "run")
    assert run.refitted is not None
    chosen = run.trained.log["best_epoch"]
    assert isinstance(epochs := run.refitted.log["epochs"], list)
    assert isinstance(before := run.trained.log["epochs"], list)
    assert len(epochs) == chosen < len(before)
    assert all(epoch["validation"] is None for epoch in epochs)
    again = run_experiment(config, split, show=False, folder=tmp_path / "run", resume=True)
    assert again.refitted is not None
    weights, same = (run.refitted.model.state_dict(), again.refitted.model.state_dict())
    assert all((weights[name] == same[name]).all() for name in weights)


def test_unused_events_stay_unused_and_all_others_are_trained_on() -> None:
    whole = events()
    part_E = np.arange(len(whole), dtype=np.uint8) % 4
    split = ft.Split(kind="given", events=whole, part_E=part_E, rolling=False)
    assert (split.everything().part_E == np.where(part_E == UNUSED, UNUSED, TRAIN)).all()
    assert split.everything().learned_from == "all events"
    assert split.learned_from == "train"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split": {"kind": "leave_last"}},
        {"split": {"kind": "random"}},
        {"model": CLICKS, "objective": {"kind": "rows", "positive": "click"}},
    ],
    ids=["rolling", "leave_last", "random", "rows"],
)
@pytest.mark.parametrize("saved", [False, True], ids=["trained", "loaded"])
def test_a_model_that_learned_from_the_test_is_not_measured_on_it(
    settings: dict[str, object], *, saved: bool, tmp_path: Path
) -> None:
    run, split, config = done(final="all", **settings)
    trained, report = run.final
    if saved:
        to_recommender(trained, report).save(tmp_path / "bundle")
        trained = ft.load(tmp_path / "bundle").trained
    with pytest.raises(DataError, match='final = "all"') as caught:
        ft.evaluate_split(trained, config, split)
    assert caught.value.name == "test"
    assert ft.evaluate_split(run.trained, config, split).metrics == run.report.metrics


def test_rows_of_validation_are_refused_after_they_were_trained_on() -> None:
    """A quarter of them is positive, and those alone are kept."""
    run, split, _ = done(
        final="validation", model=CLICKS, objective={"kind": "rows", "positive": "click"}
    )
    assert ft.evaluate_rows(run.trained, split, part="validation", resamples=0).metrics
    with pytest.raises(DataError, match="give it the test") as caught:
        ft.evaluate_rows(run.final[0], split, part="validation", resamples=0)
    assert caught.value.name == "validation"


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_what_cannot_be_calibrated_is_not_calibrated_on_rows_that_were_trained_on(
    kind: str, tmp_path: Path
) -> None:
    """A run ended in an error after both trainings where no task is binary."""
    model = {**CLICKS, "task": {"name": "click", "column": "click", "kind": kind}}
    asked = {"k": [5], "calibration": "platt"}
    run, split, config = done(final="validation", model=model, evaluation=asked)
    trained, report = run.final
    assert trained.calibration == run.trained.calibration
    assert bool(trained.calibration) == (kind == "binary")
    to_recommender(trained, report).save(tmp_path / "bundle")
    again = ft.evaluate_split(ft.load(tmp_path / "bundle").trained, config, split)
    assert again.metrics == report.metrics


@pytest.mark.parametrize(
    ("final", "learned", "measured"),
    [
        ("none", "480 events: the training part", "the test part"),
        ("validation", "540 events: the training and validation parts", "the test part"),
        ("all", "600 events: all of its split", "the test part, by a first run"),
    ],
)
def test_bundle_and_server_say_what_was_learned_from_and_measured_on(
    final: str, learned: str, measured: str, tmp_path: Path
) -> None:
    run, _, _ = done(final=final)
    to_recommender(*run.final).save(tmp_path / "bundle")
    facts = ft.inspect_bundle(tmp_path / "bundle").facts()
    slot = ModelSlot(Versions(tmp_path / "bundle"))
    with closing(open_live_events("sqlite://")) as live:
        settings, metrics = ft.ServerSettings(), Metrics()
        service = Service(slot, live, settings, bundle=tmp_path / "bundle", metrics=metrics)
        reply = service.model()
    assert str(facts["learned from"]) == reply.learned_from
    assert str(facts["measured on"]) == reply.measured_on
    assert reply.learned_from.startswith(learned)
    assert reply.measured_on.startswith(measured)
    assert ("this model was not measured" in reply.measured_on) == (final == "all")


# --- the former name ------------------------------------------------------------------------------


@pytest.mark.parametrize(("refit", "final"), [(True, "validation"), (False, "none")])
def test_refit_is_read_as_final(
    refit: bool,  # noqa: FBT001
    final: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert recipe(refit=refit).final == final
    assert override(recipe(), [f"final={final}"]).final == final
    text = f'refit = {str(refit).lower()}\ndata = {{ kind = "public", name = "ml-100k" }}\n'
    (tmp_path / "run.toml").write_text(
        text + 'split = { kind = "leave_last" }\nmodel = { kind = "ease" }\n'
    )
    assert ft.read_experiment(tmp_path / "run.toml").final == final
    (said,) = caplog.messages
    assert f'write final = "{final}" in ' in said


def to_first_format(bundle: Path) -> None:
    """Write a manifest as the first format had it, which said less."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text()) | {"format_version": 1}
    for name in ("checksum", "objective", "learned_from", "optional", "needs"):
        del document[name]
    own = hashlib.sha256(json.dumps(document, indent=2).encode()).hexdigest()
    path.write_text(json.dumps(document | {"checksum": own}, indent=2) + "\n")


@pytest.mark.parametrize(
    ("refit", "final", "learned_from"),
    [(True, "validation", "train and validation"), (False, "none", "train")],
)
def test_a_bundle_that_says_refit_is_loaded_as_before(
    refit: bool,  # noqa: FBT001
    final: str,
    learned_from: str,
    tmp_path: Path,
) -> None:
    run, _, config = done(final=final)
    trained, report = run.final
    former = {**config.model_dump(mode="json"), "refit": refit}
    del former["final"]
    to_recommender(replace(trained, settings=former), report).save(tmp_path / "bundle")
    to_first_format(tmp_path / "bundle")
    loaded = ft.load(tmp_path / "bundle").trained
    assert recipe_of(loaded).final == final
    assert loaded.learned_from == learned_from


@pytest.mark.parametrize(
    "settings",
    [{"refit": True, "final": "all"}, {"refit": "yes"}, {"final": "test"}, {"final": True}],
)
def test_what_is_neither_name_nor_value_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"refit|final"):
        recipe(**settings)


# --- nothing to measure ---------------------------------------------------------------------------

SHARES = ["temporal", "ratio", "random", "cold_items", "cold_users"]


@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize("kind", SHARES)
def test_a_split_may_have_no_test(kind: str, validation: float) -> None:
    shares = {"kind": kind, "test": 0, "validation": validation}
    config = recipe(split=shares)
    split = ft.make_split(config.split, events())
    held = int((split.part_E != TRAIN).sum())
    assert not split.has_test
    assert bool(held) == bool(validation)
    if kind in ("temporal", "ratio", "random"):
        assert held == validation * len(split.events)
    assert len(split.test) == 0
    run = run_experiment(config, split, show=False)
    assert run.report.metrics == {}
    assert str(run.report) == "nothing was measured"
    assert to_recommender(*run.final).report is None
    with pytest.raises(ConfigError) as caught:
        ft.evaluate_split(run.trained, config, split)
    assert caught.value.name == "split.test"


@pytest.mark.parametrize("final", ["validation", "all"])
def test_a_final_model_without_a_test_is_written_and_says_that_nothing_was_measured(
    final: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = events()
    users, items = (
        whole.users.ids[whole.user_idx.tolist()],
        whole.items.ids[whole.item_idx.tolist()],
    )
    table = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": whole.timestamp_s})
    table.write_csv(tmp_path / "events.csv")
    (tmp_path / "run.toml").write_text(
        f"""
        final = "{final}"
        data = {{ kind = "files", files = ["events.csv"], timestamp = "timestamp" }}
        split = {{ kind = "temporal", test = 0 }}
        model = {{ kind = "ease" }}
        """
    )
    words = ["fit", tmp_path / "run.toml", "--data-dir", tmp_path, "--out", tmp_path / "bundle"]
    with pytest.raises(SystemExit) as ended:
        command([*map(str, words)])
    assert not ended.value.code
    assert "nothing was measured" in capsys.readouterr().out
    bundle = ft.load(tmp_path / "bundle").bundle
    assert len(bundle.trained.events) == len(whole)
    assert bundle.measured_on.startswith("nothing")


def test_a_run_that_was_stopped_within_its_first_epoch_is_finished_by_one_epoch() -> None:
    config = recipe(final="all", model=SASREC)
    split = ft.make_split(config.split, events())
    run = run_experiment(config, split, show=False, max_seconds=1e-9)
    assert "out of time" in str(run.trained.log["stopped"])
    assert run.refitted is not None
    assert run.refitted.learned_from == "all events"


def test_what_both_trainings_will_cost_is_said_early(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("foretaste.training.progress._LOOK_SECONDS", 0.0)
    training = {**TRAINING, "validate_every": 1, "patience": None}
    config = recipe(model=SASREC, final="all", training=training)
    split = ft.make_split(config.split, events())
    trained = run_experiment(config, split).trained
    said = capfd.readouterr().err.splitlines()
    costs = [line for line in said if line.startswith("sasrec: about ")]
    assert len(costs) == 3  # after the first steps, after the first validation, and of the last run
    assert [" a validation" in line for line in costs] == [False, True, False]
    (again,) = (line for line in said if line.startswith('final = "all" trains again'))
    second = next(place for place, line in enumerate(said) if line.startswith("epoch 2/4"))
    assert said.index(costs[1]) < said.index(again) < second
    cost = trained.log["cost"]
    assert isinstance(cost, Mapping)
    assert (cost["epochs"], cost["validations"]) == (4, 4)
    assert cost["validation_seconds"] > 0


def test_a_training_that_costs_too_much_can_be_ended_by_on_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foretaste.training.progress._LOOK_SECONDS", 0.0)

    def refuse(cost: Cost) -> None:
        raise TooLargeError(f"{cost.seconds}")

    config = recipe(model=SASREC)
    split = ft.make_split(config.split, events())
    with pytest.raises(TooLargeError):
        ft.fit(config.model, split, training=config.training, show=False, on_cost=refuse)
