"""Several processes: the losses of one, and what happens when one of them ends.

Run by torchrun, this file trains the cases of `test_golden.py` in the processes that it is given.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
import torch
from test_golden import LOSSES, NUM_LOSSES, in_64_bits, learn, make_split, stored

import foretaste as ft
from foretaste.cli.main import run
from foretaste.data.draws import Part, Share, draw_for_keys, draw_for_rows, only_part
from foretaste.errors import ConfigError, ProcessError
from foretaste.training.fit import Epoch

TOGETHER = (
    "mf",
    "mf, the batch and the popular",  # of the batch, corrected by its frequency, hits hidden
    "mf, lazy_adamw",
    "two_tower, features",
    "sasrec",
    "bert4rec",
    "lightgcn",
    "pinsage, uniform",
    "deepfm, features",
    "din",
    "mmoe, attention",
)
ALONE = {
    "lightgcn, noise and contrast": "objective.contrast",
    "din, unnormalised and dice": "model.activation",
}
"""Cases that look at all rows of a batch at once, and the setting that does."""


TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")


def torchrun(num: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this file in so many processes."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(num), __file__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(  # our own file
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes are asked, in one start of both."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, str(folder), *TOGETHER)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_have_the_losses_of_one(of_two: Path, name: str) -> None:
    lines = (of_two / name / "steps.jsonl").read_text().splitlines()[:NUM_LOSSES]
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(stored(LOSSES)[name]["losses"], rel=1e-9, abs=0)


def test_what_needs_all_rows_in_one_process_is_refused_by_its_name(of_two: Path) -> None:
    refused = json.loads((of_two / "refused.json").read_text())
    assert {name: refused[name] for name in ALONE} == ALONE


def test_processes_with_different_settings_are_refused(of_two: Path) -> None:
    assert json.loads((of_two / "refused.json").read_text())["another model"] == "model"


def test_another_number_of_processes_goes_on_with_a_run(of_two: Path, tmp_path: Path) -> None:
    case = stored(LOSSES)["sasrec"]
    (of_two / "broken off").rename(tmp_path / "run")
    with in_64_bits():
        training = ft.TrainingConfig(**case["training"])
        ft.fit(
            ft.SASRecConfig(**case["model"]),
            make_split(),
            training=training,
            objective=ft.NextItemConfig(**case["objective"]),
            folder=tmp_path / "run",
            resume=True,
            show=False,
        )
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()[:NUM_LOSSES]
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(case["losses"], rel=1e-9, abs=0)


def test_checkpoints_of_two_processes_hold_no_pickle(of_two: Path) -> None:
    kept = {path.suffix for path in (of_two / "mf").rglob("*") if path.is_file()}
    assert kept == {".json", ".jsonl", ".safetensors"}


# --- the command ---------------------------------------------------------------------------------

RECIPE = """
[data]
kind = "files"
files = ["events.csv"]
user = "user"
item = "item"
timestamp = "time"
[split]
kind = "leave_last"
[model]
kind = "mf"
embedding_dim = 8
[training]
epochs = 2
batch_events = 64
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    events = make_split().events
    users, items = (
        [f"{side[0]}{idx}" for idx in index]
        for side, index in (("user", events.user_idx), ("item", events.item_idx))
    )
    pl.DataFrame({"user": users, "item": items, "time": events.timestamp_s}).write_csv(
        tmp_path / "events.csv"
    )
    path = tmp_path / "run.toml"
    path.write_text(RECIPE)
    return path


def fit(recipe: Path, *options: str) -> subprocess.CompletedProcess[str]:
    out = ["--out", str(recipe.parent / "bundle"), "--data-dir", str(recipe.parent)]
    return subprocess.run(  # our own command
        [sys.executable, "-m", "foretaste", "fit", str(recipe), *out, *options],
        capture_output=True,
        text=True,
        check=False,
    )


@TWO_CORES
def test_the_command_starts_processes_of_which_one_speaks_and_writes(recipe: Path) -> None:
    done = fit(recipe, "--processes", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert "ndcg_at_10" in json.loads(done.stdout)["metrics"]
    assert done.stderr.count("epoch 2/2") == 1
    assert ft.load(recipe.parent / "bundle").recommend("u3", k=3).rows


KILLED = """
import os, signal, sys, torch
from foretaste.errors import ProcessError
from foretaste.training import processes

with processes.joined_processes() as together:
    if not together.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        processes.all_rows(torch.tensor([1]))
    except ProcessError:
        sys.exit(ProcessError.followed)
"""


@TWO_CORES
def test_a_killed_process_ends_the_others_and_the_error_names_it(tmp_path: Path) -> None:
    path = tmp_path / "killed.py"
    path.write_text(KILLED)
    started, handler = time.perf_counter(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ProcessError) as caught:
        ft.start_processes(2, [str(path)])
    assert caught.value.value == 1
    assert "SIGKILL" in str(caught.value)
    assert time.perf_counter() - started < 60
    assert signal.getsignal(signal.SIGTERM) == handler


def test_more_processes_than_cores_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["fit", str(recipe), "--out", str(recipe.parent / "b"), "--processes", "1000000"])
    assert caught.value.code == 1
    assert "1000000 processes" in capsys.readouterr().err


# --- draws ---------------------------------------------------------------------------------------


def parts(num: int, world: int) -> list[Part]:
    slices = [Share(rank, world).of(num) for rank in range(world)]
    return [Part(each.start, each.stop, num) for each in slices]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("each", [1, 4])
def test_parts_of_a_draw_are_the_draw_of_one_process(world: int, each: int) -> None:
    torch.manual_seed(0)
    whole = draw_for_rows((5 * each, 3), torch.rand)
    drawn = []
    for part in parts(5, world):
        torch.manual_seed(0)
        with only_part(part, lambda key_S: key_S):
            drawn.append(draw_for_rows(((part.last - part.first) * each, 3), torch.rand))
    assert torch.equal(torch.cat(drawn), whole)


def test_a_key_has_the_same_number_in_each_process() -> None:
    every = torch.tensor([2, 3, 5, 7])
    torch.manual_seed(0)
    whole = draw_for_keys(every, torch.rand)
    for key in (every[[0, 2]], every[1:]):
        torch.manual_seed(0)
        with only_part(Part(0, 1, 2), lambda _: every):
            found = draw_for_keys(key, torch.rand)
        assert torch.equal(found, whole[torch.isin(every, key)])


# --- what runs in each process -------------------------------------------------------------------


class BrokenOff(Exception):
    """A run that is to be resumed."""


def train_together(folder: Path, names: Sequence[str]) -> None:
    """Train cases, refuse others, and break off one."""
    split, cases = make_split(), stored(LOSSES)
    refused = {}
    with ft.joined_processes() as together, in_64_bits():
        for name in names:
            learn(cases[name], split, folder / name)
        for name in ALONE:
            try:
                learn(cases[name], split)
            except ConfigError as error:
                refused[name] = error.name
        try:
            ft.fit(ft.MFConfig(embedding_dim=8 + int(os.environ["RANK"])), split, show=False)
        except ConfigError as error:
            refused["another model"] = error.name
        case = cases["sasrec"]

        def stop(epoch: Epoch) -> None:
            if epoch.epoch == 3:
                raise BrokenOff

        with suppress(BrokenOff):
            ft.fit(
                ft.SASRecConfig(**case["model"]),
                split,
                training=ft.TrainingConfig(**case["training"]),
                objective=ft.NextItemConfig(**case["objective"]),
                folder=folder / "broken off",
                on_epoch=stop,
                show=False,
            )
        if together.is_first:
            (folder / "refused.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    train_together(Path(sys.argv[1]), sys.argv[2:])
