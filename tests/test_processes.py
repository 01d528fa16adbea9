"""Several processes: they have the losses of a single one; what happens when one ends.

Run by torchrun, this file trains the cases of `test_golden.py` in the processes that it is given.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from test_golden import (
    LOSSES,
    MODEL,
    OBJECTIVE,
    first_losses,
    in_64_bits,
    learn,
    make_split,
    stored,
)

import foretaste as ft
from foretaste.cli.main import run
from foretaste.data.draws import (
    Part,
    Share,
    draw_for_keys,
    draw_for_rows,
    only_part,
    own_blocks,
    shared_out,
)
from foretaste.data.splits import TEST
from foretaste.errors import ConfigError, ProcessError
from foretaste.models.base import Ranker
from foretaste.models.catalogue import as_written
from foretaste.models.layers.pooling import generate
from foretaste.models.layers.table import Dense
from foretaste.training import processes
from foretaste.training.checkpoint import Epoch, read_checkpoint, save_tensors, write_checkpoint
from foretaste.training.fit import Fit
from foretaste.training.settings import make_optimizer
from foretaste.training.sharded import Sharded, rows_of
from foretaste.training.torchrec import lend_to_torchrec

TOGETHER = (
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
SHARDED = (
    "mf, the batch and the popular",  # clipped, and with an average of the weights
    "mf, row_adagrad",
    "sasrec, lazy_adamw",
    "lightgcn",
    "neumf, pre-trained",  # starts from tables that were dealt
    "two_stage",
)
"""Cases that are trained again with every table dealt among the processes."""
MEASURED = "two_tower, features", "pinsage, uniform", "deepfm, features"
"""Cases whose measuring is dealt, and compared with that of one process."""
ALONE = {
    "lightgcn, noise and contrast": "objective.contrast",
    "din, unnormalised and dice": "model.activation",
}
"""Cases that look at all rows of a batch at once, and the setting that does."""


TWO_CORES = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")


def torchrun(
    num: int, *arguments: str, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run this file in so many processes."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(num), *options]
    command = [*start, __file__, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    return subprocess.run(  # our own file
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All results of two processes, from a single start."""
    folder = tmp_path_factory.mktemp("two")
    with in_64_bits():
        break_off(folder / "begun by one", stored(LOSSES)["mf, row_adagrad"], make_split())
    done = torchrun(2, str(folder), *TOGETHER)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_have_the_losses_of_one(of_two: Path, name: str) -> None:
    assert first_losses(of_two / name) == pytest.approx(
        stored(LOSSES)[name]["losses"], rel=1e-9, abs=0
    )


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_that_share_the_rows_of_tables_have_the_losses_of_one(
    of_two: Path, name: str
) -> None:
    losses = first_losses(of_two / "sharded" / name)
    assert losses == pytest.approx(stored(LOSSES)[name]["losses"], rel=1e-9, abs=0)


def test_what_needs_all_rows_in_one_process_is_refused_by_its_name(of_two: Path) -> None:
    refused = json.loads((of_two / "refused.json").read_text())
    assert {name: refused[name] for name in ALONE} == ALONE


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("another model", "model"),
        ("another number of events", "data"),
        ("other events", "data"),
        ("another seed", "seed"),
        ("more processes than rows", "training.batch_events"),
        ("shared rows without a folder", "folder"),
        ("shared rows and a thread", "objective.hard_refresh_steps"),
    ],
)
def test_what_processes_cannot_train_together_is_refused_by_name(
    of_two: Path, what: str, name: str
) -> None:
    assert json.loads((of_two / "refused.json").read_text())[what] == name


def test_an_address_that_another_program_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in started.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ProcessError) as caught, ft.joined_processes():
            pass
    assert caught.value.value == f"127.0.0.1:{port}"


def test_another_number_of_processes_goes_on_with_a_run(of_two: Path, tmp_path: Path) -> None:
    case = stored(LOSSES)["sasrec"]
    (of_two / "broken off").rename(tmp_path / "run")
    with in_64_bits():
        resume(tmp_path / "run", case, make_split())
    assert first_losses(tmp_path / "run") == pytest.approx(case["losses"], rel=1e-9, abs=0)


def test_one_process_goes_on_with_a_run_of_two_that_shared_the_rows(
    of_two: Path, tmp_path: Path
) -> None:
    case = stored(LOSSES)["sasrec, lazy_adamw"]
    (of_two / "sharded, broken off").rename(tmp_path / "run")
    with in_64_bits():
        resume(tmp_path / "run", case, make_split(), sharded_from=1)
    assert first_losses(tmp_path / "run") == pytest.approx(case["losses"], rel=1e-9, abs=0)


@pytest.mark.parametrize("name", MEASURED)
def test_processes_that_share_the_measuring_find_the_figures_of_one(
    of_two: Path, name: str
) -> None:
    assert json.loads((of_two / "measured.json").read_text())[name] is True


@pytest.mark.parametrize("world", [1, 2, 5])
def test_blocks_of_all_processes_are_those_of_one(world: int) -> None:
    rows = []
    for rank in range(world):
        with shared_out(Share(rank, world), lambda _: None):
            rows += [row for block in own_blocks(10, 3) for row in range(10)[block]]
    assert sorted(rows) == list(range(10))


def test_two_processes_that_share_the_rows_go_on_with_a_run_of_one(of_two: Path) -> None:
    losses = first_losses(of_two / "begun by one")
    assert losses == pytest.approx(stored(LOSSES)["mf, row_adagrad"]["losses"], rel=1e-9, abs=0)


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
@pytest.mark.parametrize("read_by", [1, 2, 3, 4])
@pytest.mark.parametrize("num_rows", [2, 11])
def test_any_number_of_processes_reads_its_rows_of_what_any_number_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_by: int, read_by: int, num_rows: int
) -> None:
    table, bias = torch.randn(num_rows, 3), torch.randn(5)
    monkeypatch.setattr(processes, "wait", lambda: None)
    for rank in reversed(range(saved_by)):  # the first one writes the manifest
        share = Share(rank, saved_by)
        monkeypatch.setattr(processes, "share", lambda share=share: share)
        own = rows_of(num_rows, share)
        parts = {"model-1": {"table": table[own.start : own.stop], "bias": bias}}
        write_checkpoint(tmp_path, parts, {}, own={"table": own})
    read = []
    for rank in range(read_by):
        parts, _ = read_checkpoint(tmp_path, own={"table": rows_of(num_rows, Share(rank, read_by))})
        read.append(parts["model"]["table"])
        assert torch.equal(parts["model"]["bias"], bias)
    assert torch.equal(torch.cat(read), table)
    assert torch.equal(read_checkpoint(tmp_path)[0]["model"]["table"], table)


def test_checkpoints_of_two_processes_hold_no_pickle(of_two: Path) -> None:
    runs = of_two / "lightgcn", of_two / "sharded" / "mf, row_adagrad"
    kept = {path.suffix for run in runs for path in run.rglob("*") if path.is_file()}
    names = {path.name for path in runs[1].rglob("*.1-of-2.safetensors")}
    assert kept == {".json", ".jsonl", ".safetensors"}
    assert {name.partition("-")[0] for name in names} == {"model", "best", "optimizer"}


def test_a_model_with_sharded_rows_is_bit_identical_to_that_of_one_process(
    of_two: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(of_two / "sharded" / "mf, row_adagrad", run)
    with in_64_bits():  # all epochs are done, so nothing is trained
        alone = resume(run, stored(LOSSES)["mf, row_adagrad"], make_split(), sharded_from=1)
    written = load_file(run / "trained.safetensors")
    tables = [table.weight for table in alone.model.modules() if isinstance(table, Dense)]
    assert [len(rows) for rows in written.values()] == [len(rows) for rows in tables]
    assert all(map(torch.equal, written.values(), tables))
    place = tmp_path / "written.safetensors"
    save_tensors(alone.model.state_dict(), place)
    read = load_file(place)
    assert all(torch.equal(read[n], value) for n, value in alone.model.state_dict().items())


# --- TorchRec ------------------------------------------------------------------------------------

FUSED: dict[str, Any] = {
    "engine": "torchrec",
    "tables": "row_adagrad",
    "sharded_from": 1,
    "learning_rate": 0.05,
    "ema_decay": 0,
}
BY_TORCHREC: dict[str, Any] = {
    "mf": ft.MFConfig(embedding_dim=8),
    "two_tower": ft.TwoTowerConfig(embedding_dim=8),
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tables", "lazy_adamw"),
        ("gradient_clip", 1.0),
        ("weight_decay", 0.1),
        ("ema_decay", 0.9),
        ("precision", "bf16"),
        ("sharded_from", None),
    ],
)
def test_what_cannot_hold_with_torchrec_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    monkeypatch.setattr(processes, "share", lambda: Share(0, 2))
    monkeypatch.setattr("foretaste.training.torchrec.version", lambda _: "1.8.0")
    with pytest.raises(ConfigError) as caught:
        Fit(
            torch.nn.Linear(1, 1),
            ft.TrainingConfig(**FUSED | {setting: value}),
            seed=0,
            plan=pytest.fail,
            objective=pytest.fail,
        )
    assert caught.value.name == f"training.{setting}"


@pytest.mark.parametrize("found", ["0.7.0", None])
def test_a_torchrec_of_another_version_or_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(processes, "share", lambda: Share(0, 2))
    monkeypatch.setattr("foretaste.training.torchrec.version", version)
    config = ft.TrainingConfig(**FUSED)
    optimizer = make_optimizer(list(torch.nn.Linear(1, 1).parameters()), config)
    with pytest.raises(ConfigError) as caught:
        lend_to_torchrec([], config, optimizer)
    assert caught.value.name == "training.engine"


def test_torchrec_has_the_losses_of_our_own_engine_and_each_goes_on_with_the_others_run(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torchrec", reason="needs TorchRec: make torchrec")
    done = torchrun(2, str(tmp_path), "torchrec")
    assert done.returncode == 0, done.stderr
    assert "torchrec" not in done.stderr.lower()
    assert (tmp_path / "refused").read_text() == "training.engine"
    fit_fused(BY_TORCHREC["mf"], make_split(), tmp_path / "broken off" / "mf")
    for place in ("torchrec/mf", "torchrec/two_tower", "broken off/mf", "begun/mf"):
        own = first_losses(tmp_path / "own" / Path(place).name)
        assert first_losses(tmp_path / place) == pytest.approx(own, rel=1e-5, abs=0)


@pytest.mark.parametrize("language", ["bash", "yaml", "py"])
def test_files_of_other_launchers_can_be_read(language: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "processes.md").read_text()
    _, _, launchers = page.partition("## Other launchers")
    text = launchers.partition(f"```{language}\n")[2].partition("```")[0]
    match language:
        case "bash":
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        case "yaml":
            yaml = pytest.importorskip("yaml")
            replicas = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]
            command = replicas["Worker"]["template"]["spec"]["containers"][0]["command"]
            assert command == ["python", "-m", "foretaste", "fit", "/shared/run.toml"]
        case _:
            names = re.findall(r"ft\.(\w+)", text)
            assert compile(text, "train.py", "exec")
            assert set(names) <= set(ft.__all__)


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
    done = fit(recipe, "--processes", "2", "--set", "training.sharded_from=1", "--json")
    assert done.returncode == 0, done.stderr
    assert "ndcg_at_10" in json.loads(done.stdout)["metrics"]
    assert done.stderr.count("epoch 2/2") == 1
    assert ft.load(recipe.parent / "bundle").recommend("u3", k=3).rows


KILLED = """
import os, signal, sys, time, torch
from foretaste.errors import ProcessError
from foretaste.training import processes

doomed, place = int(sys.argv[1]), sys.argv[2]

def end():
    if processes.share().rank == doomed:
        os.kill(os.getpid(), signal.SIGKILL)

with processes.joined_processes() as together:
    try:
        if place == "a step":
            end()
            processes.all_rows(torch.tensor([1]))
        else:
            if not together.is_first:
                end()
            processes.by_first(lambda: end() or time.sleep(1) or 1.0)
            processes.wait()
    except ProcessError:
        sys.exit(ProcessError.followed)
"""


@TWO_CORES
@pytest.mark.parametrize(
    ("rank", "place"), [(1, "a step"), (0, "a validation"), (1, "a validation")]
)
def test_a_killed_process_ends_the_others_and_the_error_names_it(
    tmp_path: Path, rank: int, place: str
) -> None:
    path = tmp_path / "killed.py"
    path.write_text(KILLED)
    started, handler = time.perf_counter(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ProcessError) as caught:
        ft.start_processes(2, [str(path), str(rank), place])
    assert caught.value.value == rank
    assert "SIGKILL" in str(caught.value)
    assert time.perf_counter() - started < 60
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_process_that_does_not_answer_is_named_and_torchrun_starts_all_again(
    tmp_path: Path,
) -> None:
    done = torchrun(
        2, str(tmp_path), "stopped", options=["--max-restarts", "1", "--shutdown-timeout", "2"]
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 of this training has ended, or did not answer for 10 seconds" in done.stderr
    case = stored(LOSSES)["mf, row_adagrad"]
    assert first_losses(tmp_path / "run") == pytest.approx(case["losses"], rel=1e-9, abs=0)


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


@pytest.mark.parametrize("num_rows", [0, 5, 16, 17, 47, 48, 50, 100])
@pytest.mark.parametrize("world", [1, 3])
def test_initial_rows_of_a_sharded_table_are_those_of_an_unsharded_one(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, world: int
) -> None:
    monkeypatch.setattr("foretaste.training.sharded.BLOCK_ROWS", 16)
    drawn, after = [], set()
    for rank in range(world):
        monkeypatch.setattr(processes, "share", lambda rank=rank: Share(rank, world))
        torch.manual_seed(0)
        drawn.append(Sharded(num_rows, 3).weight)
        after.add(float(torch.rand(())))
    torch.manual_seed(0)
    assert torch.equal(torch.cat(drawn), Dense(num_rows, 3).weight)
    assert after == {float(torch.rand(()))}


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
    split, cases, equal = make_split(), stored(LOSSES), dict[str, bool]()
    torch.distributed.init_process_group("gloo")  # as Ray Train does before it calls
    with ft.joined_processes() as together, in_64_bits():
        for name in names:
            trained = learn(cases[name], split, folder / name)
            if name in MEASURED:
                equal[name] = is_measured_as_alone(trained, split)
        for name in SHARDED:
            training = cases[name]["training"] | {"sharded_from": 1}
            learn(cases[name] | {"training": training}, split, folder / "sharded" / name)
        refused = {name: refused_setting(partial(learn, cases[name], split)) for name in ALONE}
        refused |= refuse_others(split, int(os.environ["RANK"]))
        break_off(folder / "broken off", cases["sasrec"], split)
        case = cases["sasrec, lazy_adamw"]
        break_off(folder / "sharded, broken off", case, split, sharded_from=1)
        resume(folder / "begun by one", cases["mf, row_adagrad"], split, sharded_from=1)
        if together.is_first:
            (folder / "refused.json").write_text(json.dumps(refused))
            (folder / "measured.json").write_text(json.dumps(equal))


def is_measured_as_alone(trained: ft.Trained, split: ft.Split) -> bool:
    """Return whether processes that share the work of answers and figures get those of one."""

    def measure() -> list[str]:
        trained.model.train().eval().learn_new_users(split.train)
        trained.model.finish()
        answers = {name: value.tolist() for name, value in trained.model.state_dict().items()}
        reports: list[Any] = [ft.evaluate(trained, split.test, k=(3, 10))]
        if isinstance(trained.model, Ranker):
            reports.append(ft.evaluate_rows(trained, split))
        return [json.dumps(answers), *(report.to_json() for report in reports)]

    small = {
        "foretaste.evaluation.measure_queries.block_rows": lambda _: 7,
        "foretaste.evaluation.rows._BLOCK_ROWS": 16,
        "foretaste.models.two_tower._BLOCK_ITEMS": 3,
        "foretaste.models.pinsage.generate": partial(generate, block_nodes=11),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(name, value)
        with processes.work_divided():
            together = measure()
        return together == measure()


def train_by_torchrec(folder: Path) -> None:
    """Train by TorchRec and by our own engine, and break off a run of TorchRec's."""
    split = make_split()

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise BrokenOff

    with ft.joined_processes() as together:
        for name, model in BY_TORCHREC.items():
            fit_fused(model, split, folder / "torchrec" / name)
            fit_fused(model, split, folder / "own" / name, engine="own")
        mf = BY_TORCHREC["mf"]
        for place, engine in {"broken off": "torchrec", "begun": "own"}.items():
            with suppress(BrokenOff):
                fit_fused(mf, split, folder / place / "mf", engine=engine, on_epoch=stop)
        fit_fused(mf, split, folder / "begun" / "mf")
        twice = ft.SASRecConfig(embedding_dim=8, max_len=5, num_blocks=1)
        training = ft.TrainingConfig(**FUSED)
        refused = refused_setting(partial(ft.fit, twice, split, training=training, show=False))
        if together.is_first:
            (folder / "refused").write_text(refused)


def train_and_stop(folder: Path) -> None:
    """Train; the second process is stopped once, after three epochs."""
    case, split, was_there = stored(LOSSES)["mf, row_adagrad"], make_split(), folder / "stopped"

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 3 and int(os.environ["RANK"]) == 1 and not was_there.exists():
            was_there.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    with ft.joined_processes(timeout_seconds=10), in_64_bits():
        resume(folder / "run", case, split, sharded_from=1, on_epoch=stop)


def fit_fused(
    model: Any,
    split: ft.Split,
    folder: Path,
    on_epoch: Callable[[Epoch], None] | None = None,
    **training: Any,
) -> None:
    ft.fit(
        model,
        split,
        training=ft.TrainingConfig(epochs=3, batch_events=64, patience=None, **FUSED | training),
        objective=ft.PairsConfig(negatives=16),
        folder=folder,
        resume=True,
        on_epoch=on_epoch,
        show=False,
    )


def refuse_others(split: ft.Split, rank: int) -> dict[str, str]:
    """Return which settings are refused, by what is wrong with them."""

    def fit_mf(**settings: Any) -> ft.Trained:
        usual = {"config": ft.MFConfig(embedding_dim=8), "split": split, "show": False}
        return ft.fit(**usual | settings)

    part_E, item_E = split.part_E.copy(), split.events.item_idx.copy()
    if rank:
        part_E[0], item_E = TEST, item_E[::-1].copy()
    fewer = replace(split, part_E=part_E)
    others = replace(split, events=replace(split.events, item_idx=item_E))
    small, sharded = ft.TrainingConfig(batch_events=1), ft.TrainingConfig(sharded_from=1)
    threads = ft.PairsConfig(hard_negatives=1, hard_from="index", hard_refresh_steps=2)
    tries: dict[str, Callable[[], object]] = {
        "another model": lambda: fit_mf(config=ft.MFConfig(embedding_dim=8 + rank)),
        "another number of events": lambda: fit_mf(split=fewer),
        "other events": lambda: fit_mf(split=others),
        "another seed": lambda: fit_mf(seed=rank),
        "more processes than rows": lambda: fit_mf(training=small),
        "shared rows and a thread": lambda: fit_mf(training=sharded, objective=threads),
        "shared rows without a folder": lambda: fit_mf(training=sharded),
    }
    return {what: refused_setting(train) for what, train in tries.items()}


def refused_setting(train: Callable[[], object]) -> str:
    """Return the name of the setting that is refused."""
    try:
        train()
    except ConfigError as error:
        return error.name
    return ""


def break_off(
    folder: Path, case: Mapping[str, Any], split: ft.Split, *, sharded_from: int | None = None
) -> None:
    """Train for three epochs, as if the run were killed then."""

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 3:
            raise BrokenOff

    with suppress(BrokenOff):
        resume(folder, case, split, sharded_from=sharded_from, on_epoch=stop)


def resume(
    folder: Path,
    case: Mapping[str, Any],
    split: ft.Split,
    *,
    sharded_from: int | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> ft.Trained:
    """Train from a folder's checkpoint on, or from the start."""
    return ft.fit(
        MODEL.validate_python(as_written(case["model"])),
        split,
        training=ft.TrainingConfig(**case["training"] | {"sharded_from": sharded_from}),
        objective=OBJECTIVE.validate_python(case["objective"]),
        folder=folder,
        resume=True,
        on_epoch=on_epoch,
        show=False,
    )


if __name__ == "__main__":
    if sys.argv[2:] == ["torchrec"]:
        train_by_torchrec(Path(sys.argv[1]))
    elif sys.argv[2:] == ["stopped"]:
        train_and_stop(Path(sys.argv[1]))
    else:
        train_together(Path(sys.argv[1]), sys.argv[2:])
