from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import torch

from foretaste.experiment.facts import run_facts


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
