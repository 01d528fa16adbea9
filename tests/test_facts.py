import json
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from foretaste.experiment.facts import run_facts
from foretaste.experiment.recipe import ExperimentConfig, Protocol, read_experiment
from foretaste.experiment.record import protocol_of
from foretaste.models.base import LearnsBy


def test_a_run_s_date_is_now_in_utc_to_the_second() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    date = datetime.fromisoformat(str(run_facts()["date"]))
    assert before <= date <= datetime.now(UTC)
    assert (date.utcoffset(), date.microsecond) == (timedelta(0), 0)


def test_the_threads_are_torch_s_unless_told() -> None:
    assert run_facts()["threads"] == torch.get_num_threads()
    told = torch.get_num_threads() + 1
    assert run_facts(threads=told)["threads"] == told


def test_versions_of_further_packages_stand_beside_the_usual_ones() -> None:
    usual, more = (run_facts(packages=names)["versions"] for names in ((), ("pandas",)))
    assert isinstance(usual, dict)
    assert "pandas" not in usual
    assert more == {**usual, "pandas": version("pandas")}


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
        ({"kind": "sasrec"}, "next_item", None, "all items"),
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
