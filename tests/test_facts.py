import json
import runpy
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from foretaste.experiment.recipe import ExperimentConfig, Protocol, read_experiment
from foretaste.experiment.record import protocol_of, run_facts
from foretaste.models.base import LearnsBy


def test_a_run_s_date_is_now_in_utc_to_the_second() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    date = datetime.fromisoformat(str(run_facts()["date"]))
    assert before <= date <= datetime.now(UTC)
    assert (date.utcoffset(), date.microsecond) == (timedelta(0), 0)


def test_the_threads_are_those_of_torch_by_default() -> None:
    assert run_facts()["threads"] == torch.get_num_threads()
    told = torch.get_num_threads() + 1
    assert run_facts(threads=told)["threads"] == told


def test_versions_of_further_packages_are_added_to_the_usual_ones() -> None:
    usual, more = (run_facts(packages=names)["versions"] for names in ((), ("pandas",)))
    assert isinstance(usual, dict)
    assert "pandas" not in usual
    assert more == {**usual, "pandas": version("pandas")}


ROOT = Path(__file__).parents[1]
mean_of_seeds = runpy.run_path(str(ROOT / "scripts" / "mean_of_seeds"))["mean_of_seeds"]


def seed_record(seed: int, auc: float) -> dict:
    command = f"foretaste fit recipes/x.toml --out x --set seed={seed}"
    counted = {"epochs": 10 + seed, "train_seconds": 1.0, "date": f"2026-01-0{seed + 1}"}
    figures = {"metrics": {"auc": auc}, "intervals": {"auc": [0, 1]}}
    return {"recipe": "x", "seed": seed, "command": command, **counted, **figures, "notes": ""}


def test_the_record_of_several_seeds_holds_their_mean_and_how_far_another_may_lie() -> None:
    # .7, .8, .9: mean .8, deviation .1; t at 97.5 % with 2 degrees of freedom is 4.3027.
    found = mean_of_seeds([seed_record(0, 0.7), seed_record(1, 0.8), seed_record(2, 0.9)])
    assert found["metrics"]["auc"] == pytest.approx(0.8)
    assert found["intervals"]["auc"] == pytest.approx([0.8 - 0.2484, 0.8 + 0.2484], abs=1e-4)
    assert (found["seeds"], found["epochs"], found["date"]) == ([0, 1, 2], 11, "2026-01-03")
    assert found["metrics_of_seeds"] == {"auc": [0.7, 0.8, 0.9]}
    assert found["command"].endswith("--out x --set seed=N, N in [0, 1, 2]")


def test_records_of_one_seed_or_of_other_settings_are_no_seeds_of_one_run() -> None:
    one = seed_record(0, 0.7)
    for others in ([], [one], [seed_record(1, 0.7) | {"notes": "wider"}]):
        with pytest.raises(ValueError, match=r"seed"):
            mean_of_seeds([one, *others])


RESULTS = sorted((Path(__file__).parents[1] / "recipes" / "results").glob("*.json"))


@pytest.mark.parametrize("path", [p for p in RESULTS if p.stem != "times"], ids=lambda p: p.stem)
def test_every_result_says_what_it_may_be_compared_by(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    ours = Protocol(**{name: record[name] for name in Protocol.model_fields})
    config = read_experiment(path.parents[1] / f"{record['recipe']}.toml")
    learns_by = "rows" if config.objective is None else config.objective.kind
    assert ours.negatives == protocol_of(config, {}, learns_by=learns_by).negatives
    if record["published"]:
        assert Protocol(**record["published_as"]) == config.published_as
    if "refitted" in record:
        assert record["refitted"]["trained_on"] == "train and validation"


@pytest.mark.parametrize("path", [p for p in RESULTS if p.stem != "times"], ids=lambda p: p.stem)
def test_notes_are_the_recipe_s_and_say_above_and_below_only_of_figures_that_are(
    path: Path,
) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    config = read_experiment(path.parents[1] / f"{record['recipe']}.toml")
    said = " ".join(record["notes"].split())
    assert said == " ".join(config.notes.split())
    runs = [record, *([record["refitted"]] if "refitted" in record else [])]
    ahead = [
        run["metrics"][name] - value
        for run in runs
        if Protocol(trained_on=run["trained_on"], negatives=record["negatives"]).may_be_compared(
            config.published_as
        )
        for name, value in record["published"].items()
    ]
    if "bove the published figure" in said:
        assert ahead
        assert min(ahead) > 0
    if "elow the published figure" in said:
        assert ahead
        assert min(ahead) < 0


def test_figures_are_compared_with_those_of_as_many_events_and_the_same_negatives() -> None:
    first, refit = Protocol(), Protocol(trained_on="train and validation")
    assert first.may_be_compared(Protocol(selection="test"))  # how an epoch is chosen is said apart
    assert first.may_be_compared(Protocol(negatives="all items"))
    assert not first.may_be_compared(refit)
    assert not first.may_be_compared(Protocol(negatives="fixed"))


@pytest.mark.parametrize(
    ("model", "learns_by", "objective", "negatives"),
    [
        ({"kind": "ease"}, "events", None, "none"),
        ({"kind": "sasrec"}, "next_item", None, "drawn again"),
        ({"kind": "sasrec"}, "next_item", {"kind": "next_item"}, "all items"),
        ({"kind": "sasrec"}, "next_item", {"kind": "next_item", "loss": "bce"}, "drawn again"),
        ({"kind": "mf"}, "pairs", {"kind": "pairs", "loss": "softmax"}, "all items"),
        ({"kind": "mf"}, "pairs", None, "drawn again"),
        ({"kind": "din", "task": {"name": "click", "column": "click"}}, "rows", None, "fixed"),
        ({"kind": "din"}, "rows", None, "drawn again"),
    ],
)
def test_a_protocol_says_what_negatives_a_recipe_has(
    model: dict[str, object],
    learns_by: LearnsBy,
    objective: dict[str, object] | None,
    negatives: str,
) -> None:
    config = ExperimentConfig.model_validate(
        {
            "data": {"kind": "public", "name": "ml-100k"},
            "split": {"kind": "leave_last"},
            "model": model,
            "objective": objective,
        }
    )
    seen = {"epochs": [{"validation": 0.5}]}
    found = protocol_of(config, seen, learns_by=learns_by)
    assert found == Protocol(negatives=negatives)  # type: ignore[arg-type]
    assert protocol_of(config, {}, learns_by=learns_by).selection == "fixed epochs"
