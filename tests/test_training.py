"""The training loop: steps by hand, exact resume, early stopping, and non-finite values."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foretaste.data.batch import Queries
from foretaste.data.draws import epoch_generator, step_generator, step_seed
from foretaste.data.interactions import Interactions
from foretaste.data.plans import Plan, SequencePlan, plan_pairs, plan_sequences
from foretaste.data.vocabulary import Vocabulary
from foretaste.errors import BundleError, ConfigError, DataError, NonFiniteError
from foretaste.experiment.run import start_run
from foretaste.models.bert4rec import BERT4Rec, BERT4RecConfig
from foretaste.models.layers.table import Dense
from foretaste.models.mf import MF, MFConfig
from foretaste.models.sasrec import SASRec, SASRecConfig
from foretaste.training import checkpoint
from foretaste.training.checkpoint import Epoch, read_checkpoint, write_checkpoint
from foretaste.training.fit import Fit
from foretaste.training.objectives import (
    MaskedItem,
    MaskedItemConfig,
    NextItem,
    NextItemConfig,
    Pairs,
    PairsConfig,
)
from foretaste.training.progress import Cost, CostWatch
from foretaste.training.settings import TrainingConfig, rate_factor
from tests.worlds import every_vector


@dataclass
class Number:
    value: float

    def __len__(self) -> int:
        return 1

    def to(self, device: torch.device) -> "Number":
        return self


@dataclass
class Numbers(Plan[Number]):
    values: list[float]

    @property
    def num_events(self) -> int:
        return len(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, index: int) -> Number:
        return Number(self.values[index])


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))


def times(model: nn.Module, batch: Number, _: torch.Generator) -> Tensor:
    return model.w * batch.value


def scalar_fit(values: list[float], config: TrainingConfig, **more) -> tuple[Scalar, Fit]:
    model = Scalar()
    run = Fit(model, config, seed=0, plan=lambda _: Numbers(values), objective=times, **more)
    return model, run


def plain(**settings) -> TrainingConfig:
    return TrainingConfig(
        **{"learning_rate": 0.1, "warmup_steps": 0, "epochs": 1, "device": "cpu"} | settings
    )


def test_each_batch_takes_its_own_step_and_no_more() -> None:
    # loss = g w with g = 1, -1: Adam's first step is -lr sign(g). For the second, m = (.9 * .1 -
    # .1) / .19 = -0.0526 and v = 1, so w = -0.1 + 0.1 * 0.0526. Gradients left over from the
    # first batch would cancel it to 0, and the step would be another.
    model, run = scalar_fit([1.0, -1.0], plain())
    run.run()
    assert model.w.item() == pytest.approx(-0.1 + 0.1 * 0.01 / 0.19, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1]),
        ("linear", [1 / 3, 2 / 3 * 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3 * (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.5 - 0.5 * 0.5**0.5]),
    ],
)
def test_the_rate_rises_then_follows_its_schedule(schedule: str, factors: list[float]) -> None:
    config = plain(warmup_steps=2, schedule=schedule)
    assert [rate_factor(config, step, 4) for step in range(4)] == pytest.approx(factors)


def test_small_data_get_small_steps_and_a_short_warm_up() -> None:
    # 340 rows: 10 steps of 32 and one of 20, so the rate is whole after two epochs of 11.
    usual, asked = TrainingConfig(), TrainingConfig(batch_events=8192, warmup_steps=200)
    assert [usual.batch_of(rows) for rows in (1, 340, 100_000, 10**7)] == [32, 32, 3125, 8192]
    assert [usual.warmup_of(steps) for steps in (11, 32, 5000)] == [22, 64, 200]
    assert (asked.batch_of(340), asked.warmup_of(11)) == (8192, 200)
    factors = [rate_factor(usual, step, 11) for step in (0, 21, 22)]
    assert factors == pytest.approx([1 / 23, 22 / 23, 1])


def test_clipping_bounds_the_whole_gradient() -> None:
    model, run = scalar_fit([100.0], plain(gradient_clip=0.5))
    run.run()
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(0.5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    model, run = scalar_fit([math.nan, 1.0, math.inf], plain())
    progress = run.run()
    assert progress.skipped == 2
    assert model.w.item() == pytest.approx(-0.1)


def test_the_loss_of_an_epoch_is_the_mean_over_steps_that_have_one() -> None:
    # w is 0, then -0.1: the losses are 0, none, -0.1.
    _, run = scalar_fit([1.0, math.nan, 1.0], plain())
    assert run.run().epochs[0]["loss"] == pytest.approx(-0.05)


def test_twenty_such_steps_in_a_row_end_the_run() -> None:
    _, run = scalar_fit([math.nan] * 30, plain())
    with pytest.raises(NonFiniteError, match=r"20 steps in a row.*learning_rate"):
        run.run()


def test_early_stop_keeps_the_best_weights() -> None:
    scores, seen = iter([0.1, 0.5, 0.4, 0.3]), []

    def validate(model: nn.Module) -> float:
        seen.append(model.w.item())
        return next(scores)

    model, run = scalar_fit([1.0], plain(epochs=10, patience=2), validate=validate)
    progress = run.run()
    assert progress.best_epoch == 2
    assert progress.epoch == 4
    assert "epoch 2" in progress.done
    assert model.w.item() == seen[1] != seen[3]


def values_of(values: list[float], **settings) -> tuple[Fit, list[Epoch]]:
    """Return a run that is validated as said, and its epochs; each of them is one step."""
    level = settings.pop("level", -math.inf)
    given, epochs = iter(values), []
    config = plain(epochs=len(values), **settings)
    _, run = scalar_fit([1.0], config, validate=lambda _: next(given), level=level)
    run.run(on_epoch=epochs.append)
    return run, epochs


@pytest.mark.parametrize(
    ("values", "ended"),
    [
        # No value is above the level of .5 before the fifteenth: the tenth without a better one
        # would be the eleventh, and the fourth is better.
        ([0.4, 0.3, 0.3, 0.41, *[0.4] * 10, 0.6, 0.5, 0.5, 0.5], 14),
        ([0.4, 0.3, 0.3, 0.41, *[0.4] * 9, 0.6, 0.5, 0.5, 0.5], 16),
        ([0.5] * 20, 11),  # the level itself is not above it
        ([0.6, 0.5, 0.5, 0.5], 3),
        ([0.4, 0.51, 0.5, 0.5, 0.5], 4),
    ],
)
def test_patience_is_five_times_as_long_on_the_level_of_popularity(
    values: list[float], ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_PATIENT_EPOCHS", 2), ("_PATIENT_STEPS", 1), ("_LAST", 1)):
        monkeypatch.setattr(f"foretaste.training.fit.{name}", value)
    run, epochs = values_of(values, level=0.5)
    assert len(epochs) == ended
    assert run.progress.done.startswith("no better validation")
    asked, _ = values_of(values, patience=2, level=0.5)  # a number is taken as it is
    assert asked.progress.epoch == 3 + (values[1] > values[0])


def test_a_run_that_never_leaves_the_level_ends_with_its_epochs() -> None:
    run, epochs = values_of([0.3] * 40, level=0.5)
    assert (len(epochs), run.progress.done) == (40, "all epochs done")


@pytest.mark.parametrize(
    ("steps", "every", "patience"),
    [(61, 1, 5), (32, 1, 10), (1, 1, 300), (32, 4, 3), (32, 20, 2), (150, 2, 3)],
)
def test_patience_by_itself_lasts_five_epochs_and_300_steps(
    steps: int, every: int, patience: int
) -> None:
    # Of 32 steps an epoch 300 take ten epochs: ten validations, or three of every fourth epoch.
    values = [1.0, *[0.0] * (patience + 1)]
    given = iter(values)
    _, run = scalar_fit(
        [0.0] * steps,
        plain(epochs=every * len(values)),
        validate=lambda _: next(given),
        validate_every=every,
        level=0.5,
    )
    progress = run.run()
    assert progress.epoch == every * (1 + patience)


def test_patience_by_itself_watches_the_mean_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    # One value is high by luck. Means: .1, .25, .233, .3, .283, .337, .36, .37, .38, then no more.
    monkeypatch.setattr("foretaste.training.fit._PATIENT_STEPS", 1)
    values = [0.1, 0.4, 0.2, 0.3, 0.35, 0.36, 0.37, 0.38, 0.39, *[0.38] * 9]
    run, epochs = values_of(values)
    assert len(epochs) == 10 + 5
    assert run.progress.best_epoch == 2
    _, plain_epochs = values_of(values, patience=5)
    assert len(plain_epochs) == 7


@pytest.mark.parametrize("killed_after", range(1, 9, 3))
def test_a_resumed_run_waits_as_long_as_one_that_was_not_broken_off(
    killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.training.fit._PATIENT_STEPS", 1)

    def run_of(folder: Path) -> Fit:
        return scalar_fit(
            [1.0],
            plain(epochs=30, checkpoint_seconds=0),
            validate=lambda model: -((model.w.item() + 0.35) ** 2),
            folder=folder,
            level=-0.01,
        )[1]

    def kill(epoch: Epoch) -> None:
        if epoch.epoch == killed_after:
            raise KeyboardInterrupt

    whole = run_of(tmp_path / "whole").run()
    assert (whole.epoch, whole.best_epoch) == (9, 3)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "broken").run(on_epoch=kill)
    resumed = run_of(tmp_path / "broken").run(resume=True)
    for name in ("epoch", "done", "best", "best_epoch", "watched", "waited", "last"):
        assert getattr(resumed, name) == getattr(whole, name), name


def test_the_average_of_weights_is_what_is_kept() -> None:
    # w goes 0, -0.1, -0.2; the average follows with decay min(.5, 1/10), min(.5, 2/11).
    model, run = scalar_fit([1.0, 1.0], plain(ema_decay=0.5))
    run.run()
    first = -0.1 * 0.9
    assert model.w.item() == pytest.approx(first + (-0.2 - first) * (1 - 2 / 11), abs=1e-6)


@pytest.mark.parametrize("validated", [True, False])
def test_the_average_has_the_models_own_moving_means(*, validated: bool) -> None:
    # Two batches of the constant 1: the mean moves by a tenth of the way, 0.1, then 0.19.
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

    model, seen = Normed(), []

    def validate(judged: nn.Module) -> float:
        seen.append(judged.norm.running_mean.item())
        return 0.0

    Fit(
        model,
        plain(ema_decay=0.5),
        seed=0,
        plan=lambda _: Numbers([1.0, 1.0]),
        objective=lambda m, batch, _: m.norm(torch.full((2, 1), batch.value)).sum(),
        validate=validate if validated else None,
    ).run()
    assert model.norm.running_mean.item() == pytest.approx(0.19)
    assert seen == pytest.approx([0.19] * validated)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_at_the_door() -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        scalar_fit([1.0], plain(device="cuda"))


def test_a_checkpoint_gives_back_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a checkpoint"):
        read_checkpoint(tmp_path)
    facts = {"x": [1, -math.inf], "progress": {"loss": 0.1}}
    write_checkpoint(tmp_path, {"model-3": {"a": torch.ones(2)}, "best-1": {}}, facts)
    parts, found = read_checkpoint(tmp_path)
    assert parts["model"]["a"].tolist() == [1, 1]
    assert (parts["best"], found) == ({}, facts)
    write_checkpoint(tmp_path, {"model-4": {"a": torch.zeros(2)}}, {})
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "model-4.safetensors"]


@pytest.mark.parametrize("file", ["manifest.json", "model-3.safetensors"])
def test_a_changed_or_missing_part_of_a_checkpoint_is_named(tmp_path: Path, file: str) -> None:
    write_checkpoint(tmp_path, {"model-3": {"a": torch.ones(2)}}, {})
    whole = (tmp_path / file).read_bytes()
    for content in (whole[:20], whole[:-3] + b"abc", None):
        (tmp_path / file).unlink()
        if content is not None:
            (tmp_path / file).write_bytes(content)
        with pytest.raises(BundleError, match=r"without --resume|is not a checkpoint") as caught:
            read_checkpoint(tmp_path)
        assert str(caught.value.name).endswith((file, str(tmp_path)))
        (tmp_path / file).write_bytes(whole)


def test_a_part_of_the_same_name_is_not_written_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"best-1": {"a": torch.ones(2)}}, {})
    before = (tmp_path / "best-1.safetensors").stat().st_ino
    write_checkpoint(tmp_path, {"best-1": {"a": torch.ones(2)}, "model-2": {}}, {})
    assert (tmp_path / "best-1.safetensors").stat().st_ino == before


@pytest.mark.parametrize("call", ["safetensors", "manifest"])
def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_checkpoint(tmp_path, {"model-1": {"a": torch.ones(2)}}, {"step": 1})
    if call == "safetensors":
        monkeypatch.setattr(checkpoint, "save_tensors", fail)
    else:
        monkeypatch.setattr(checkpoint.CheckpointManifest, "render", fail)
    with pytest.raises(DataError, match="No space left on device"):
        write_checkpoint(tmp_path, {"model-2": {"a": torch.zeros(2)}}, {"step": 2})
    parts, facts = read_checkpoint(tmp_path)
    assert (parts["model"]["a"].tolist(), facts) == ([1, 1], {"step": 1})
    monkeypatch.undo()
    write_checkpoint(tmp_path, {"model-2": {"a": torch.zeros(2)}}, {"step": 2})
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "model-2.safetensors"]


def test_a_checkpoint_of_the_former_layout_is_named_and_kept(tmp_path: Path) -> None:
    former = tmp_path / "b.run" / "checkpoint.safetensors"
    former.parent.mkdir()
    save_file({"model.items.weight": torch.ones(2)}, former, metadata={"facts": "{}"})
    content = former.read_bytes()
    _, run = sasrec_fit(former.parent)
    for resume in (
        lambda: run.run(resume=True),
        lambda: start_run(tmp_path / "b", resume=True),
        lambda: start_run(tmp_path / "b"),
    ):
        with pytest.raises(BundleError, match=r"earlier version of foretaste.*--replace") as caught:
            resume()
        assert caught.value.name == str(former)
        assert former.read_bytes() == content
    assert start_run(tmp_path / "b", replace=True) == former.parent
    run.run()
    assert not former.exists()
    assert (former.parent / "checkpoint" / "manifest.json").exists()


def test_a_new_run_deletes_no_file_that_is_not_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "thesis.txt").write_text("years of work")
    _, run = sasrec_fit(tmp_path, epochs=1)
    run.run()
    assert (tmp_path / "checkpoint" / "thesis.txt").read_text() == "years of work"


def chain_events(num_users: int = 60, num_items: int = 20) -> Interactions:
    """Users walk round a ring of items: after i comes i + 1."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 15, num_users)
    start = generator.integers(0, num_items, num_users)
    step = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Interactions(
        users=Vocabulary(pl.Series(range(num_users), dtype=pl.Int64)),
        items=Vocabulary(pl.Series(range(num_items), dtype=pl.Int64)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item_idx=((np.repeat(start, lengths) + step) % num_items).astype(np.int32),
    )


def sasrec_fit(folder: Path | None = None, **settings) -> tuple[SASRec, Fit]:
    events = chain_events()
    torch.manual_seed(1)
    model = SASRec(SASRecConfig(embedding_dim=8, num_heads=1, max_len=6), num_items=20)

    def plan(epoch: int) -> SequencePlan:
        return plan_sequences(
            events,
            max_len=6,
            batch_events=100,
            windows="all",
            generator=epoch_generator(1, epoch),
        )

    def validate(judged: nn.Module) -> float:
        return -judged.item_table.weight.abs().sum().item()

    config = plain(
        **{"epochs": 4, "ema_decay": 0.9, "learning_rate": 0.01, "patience": None} | settings
    )
    objective = NextItemConfig(loss="sampled_softmax", negatives=5, popularity_power=0.5)
    run = Fit(
        model,
        config,
        seed=1,
        plan=plan,
        objective=NextItem(objective, events),
        validate=validate,
        folder=folder,
    )
    return model, run


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 5, 9, 14])
def test_a_run_broken_off_anywhere_resumes_to_the_same_bits(
    tmp_path: Path, stop_after: int
) -> None:
    whole_model, whole = sasrec_fit(tmp_path / "whole")
    whole.run()
    steps_left = iter(range(stop_after))

    def kill(*_: object) -> None:
        if next(steps_left, None) is None:
            raise Killed

    _, broken = sasrec_fit(tmp_path / "broken", checkpoint_seconds=0)
    with pytest.raises(Killed):
        broken.run(on_step=kill)
    resumed_model, resumed = sasrec_fit(tmp_path / "broken", checkpoint_seconds=0)
    progress = resumed.run(resume=True)
    assert progress.step == whole.progress.step
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name
    logs = [(tmp_path / n / "steps.jsonl").read_text() for n in ("whole", "broken")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == whole.progress.step


def test_other_settings_are_no_resume(tmp_path: Path) -> None:
    _, first = sasrec_fit(tmp_path, epochs=1)
    first.run()
    _, second = sasrec_fit(tmp_path, epochs=2)
    with pytest.raises(ConfigError, match="resume with the same settings"):
        second.run(resume=True)


def test_resume_without_a_folder_is_refused() -> None:
    _, run = sasrec_fit()
    with pytest.raises(ConfigError, match="pass the folder"):
        run.run(resume=True)


@pytest.mark.slow
def test_kill_9_loses_nothing_that_matters(tmp_path: Path) -> None:
    """A real process, killed by the system in mid-training, then resumed."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_training import sasrec_fit\n"
        "def linger(progress, _): time.sleep(0 if progress.step < 120 else 600)\n"
        "_, run = sasrec_fit(Path(sys.argv[1]), epochs=40, checkpoint_seconds=0.02)\n"
        "run.run(resume=True, on_step=linger)\n"
    )
    call = [sys.executable, "-c", program, str(tmp_path / "killed"), str(Path(__file__).parent)]
    process = subprocess.Popen(call, env=os.environ | {"OMP_NUM_THREADS": "1"})
    killed = tmp_path / "killed"
    log, saved = killed / "steps.jsonl", killed / "checkpoint" / "manifest.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        saved.exists() and len(log.read_text().splitlines()) > 30
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed_model, resumed = sasrec_fit(tmp_path / "killed", epochs=40, checkpoint_seconds=0.02)
    resumed._restore()
    assert 0 < resumed.progress.step <= 120
    resumed.run(resume=True)
    whole_model, whole = sasrec_fit(tmp_path / "whole", epochs=40, checkpoint_seconds=1e9)
    whole.run()
    assert log.read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()
    for name, value in whole_model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_the_same(precision: str) -> None:
    losses = {}
    for name in ("fp32", precision):
        seen: list[Epoch] = []
        _, run = sasrec_fit(precision=name, epochs=6)
        run.run(on_epoch=seen.append)
        losses[name] = seen[-1].loss
    assert losses[precision] == pytest.approx(losses["fp32"], abs=0.05)


@pytest.mark.parametrize(("gain", "chosen"), [(0.0, "fp32"), (math.inf, "bf16")])
def test_measuring_the_precision_leaves_nothing_in_the_run(
    gain: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foretaste.training.fit._GAIN", gain)
    measured_model, measured = sasrec_fit(tmp_path, precision="auto", epochs=2)
    assert measured.run().precision == chosen
    model, run = sasrec_fit(precision=chosen, epochs=2)
    run.run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, measured_model.state_dict()[name]), name
    monkeypatch.setattr("foretaste.training.fit._GAIN", math.inf if gain == 0 else 0.0)
    _, resumed = sasrec_fit(tmp_path, precision="auto", epochs=2)
    resumed._restore()
    assert resumed.progress.precision == chosen  # what was chosen is not measured again


def test_measuring_the_precision_leaves_moving_means_as_they_were() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

    def objective(model: nn.Module, batch: Number, _: torch.Generator) -> Tensor:
        return model.norm(torch.full((3, 2), batch.value)).sum() * 0.0

    model = Normed()
    run = Fit(
        model,
        plain(precision="auto"),
        seed=0,
        plan=lambda _: Numbers([5.0]),
        objective=objective,
    )
    run.run()
    assert model.norm.running_mean.tolist() == pytest.approx([0.5, 0.5])  # of one step


def losses_of(config: NextItemConfig, *, draws: int) -> tuple[Tensor, Tensor]:
    """The mean loss and its mean gradient to the item table over many draws of negatives."""
    events = chain_events()
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(embedding_dim=4, num_heads=1, max_len=8), num_items=20).eval()
    nn.init.normal_(model.item_table.weight, std=0.2)
    objective = NextItem(config, events)
    batch = plan_sequences(
        events,
        max_len=8,
        batch_events=10_000,
        windows="last",
        generator=np.random.default_rng(0),
    ).batch(0)
    total, gradient = torch.zeros(()), torch.zeros(20, 4)
    for _ in range(draws):
        loss = objective(model, batch)
        (found,) = torch.autograd.grad(loss, [model.item_table.weight])
        total, gradient = total + loss.detach() / draws, gradient + found / draws
    return total, gradient


def test_all_items_as_negatives_are_the_full_softmax() -> None:
    full, sampled = (
        losses_of(NextItemConfig(loss=loss, negatives=20), draws=1)
        for loss in ("softmax", "sampled_softmax")
    )
    assert torch.equal(full[1], sampled[1])


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_the_correction_brings_the_sampled_softmax_to_the_full_one(power: float) -> None:
    full_loss, full_gradient = losses_of(NextItemConfig(loss="softmax"), draws=1)

    def errors(*, log_q: bool) -> tuple[float, float]:
        config = NextItemConfig(
            loss="sampled_softmax", negatives=8, popularity_power=power, log_q=log_q
        )
        loss, gradient = losses_of(config, draws=200)
        return (
            abs(float(loss - full_loss)),
            float((gradient - full_gradient).norm() / full_gradient.norm()),
        )

    corrected, plain = errors(log_q=True), errors(log_q=False)
    # Without it the logarithm misses about ln(20 / 8) = 0.92.
    assert corrected[0] < 0.1
    assert plain[0] > 0.5
    assert corrected[1] < 0.75 * plain[1]


def test_the_plain_bce_weighs_all_negatives_as_one() -> None:
    few, many = (
        losses_of(NextItemConfig(loss="bce", negatives=n), draws=150)[0].item() for n in (2, 19)
    )
    assert few == pytest.approx(many, rel=0.03)


@pytest.mark.parametrize(
    ("loss", "epochs", "learning_rate"),
    # gBCE comes slowly off its start: after 30 steep epochs, seeds and processors differ
    [("softmax", 20, 0.02), ("sampled_softmax", 20, 0.02), ("bce", 20, 0.02), ("gbce", 60, 0.01)],
)
def test_every_loss_learns_the_ring(loss: str, epochs: int, learning_rate: float) -> None:
    events = chain_events(num_users=200)
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(embedding_dim=16, num_heads=1, max_len=8), num_items=20)
    run = Fit(
        model,
        plain(epochs=epochs, learning_rate=learning_rate),
        seed=0,
        plan=lambda epoch: plan_sequences(
            events,
            max_len=8,
            batch_events=400,
            windows="all",
            generator=epoch_generator(0, epoch),
        ),
        objective=NextItem(NextItemConfig(loss=loss, negatives=10), events),
    )
    run.run()

    with torch.inference_mode():
        query = model.encode(Queries.of_histories([[i, (i + 1) % 20] for i in range(20)]))
        best = (query @ every_vector(model).T).argmax(dim=1)
    hits = (best == (torch.arange(20) + 2) % 20).float().mean().item()
    assert hits >= 0.7  # chance is 0.05


def test_the_log_has_a_line_a_step(tmp_path: Path) -> None:
    _, run = sasrec_fit(tmp_path)
    progress = run.run()
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(progress.step))
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_step_draws_what_torch_seeded_by_its_number_draws() -> None:
    torch.manual_seed(step_seed(3, 1, 4))
    expected = torch.rand(5)
    torch.manual_seed(0)
    generator = step_generator(3, 1, 4)
    assert torch.equal(torch.rand(5, generator=generator), expected)


@pytest.mark.parametrize("objective", [NextItem, MaskedItem, Pairs])
def test_an_objective_draws_from_the_generator_it_is_given_alone(objective: type) -> None:
    events = chain_events()
    num_users, num_items = events.num_users, events.num_items
    config = {"loss": "sampled_softmax", "negatives": 4, "row_negatives": 2, "in_batch": True}
    generator = np.random.default_rng(0)
    windows = plan_sequences(
        events, max_len=6, batch_events=60, windows="all", generator=generator
    ).batch(0)
    pairs = plan_pairs(events, batch_events=40, generator=generator).batch(0)
    torch.manual_seed(0)
    match objective.__name__:
        case "NextItem":
            sasrec = SASRecConfig(embedding_dim=8, max_len=6, dropout=0.0)
            parts = SASRec(sasrec, num_items=num_items), NextItemConfig(**config), windows
        case "MaskedItem":
            bert4rec = BERT4RecConfig(embedding_dim=8, max_len=6, dropout=0.0)
            parts = BERT4Rec(bert4rec, num_items=num_items), MaskedItemConfig(**config), windows
        case _:
            mf = MF(MFConfig(embedding_dim=8), num_users=num_users, num_items=num_items)
            parts = mf, PairsConfig(**config), pairs
    model, settings, batch = parts
    learned = objective(settings, events)

    def loss(seed: int, *, of_torch: int) -> float:
        torch.manual_seed(of_torch)
        value: float = learned(model, batch, torch.Generator().manual_seed(seed)).item()
        return value

    first = loss(1, of_torch=5)
    assert loss(1, of_torch=6) == first
    assert loss(2, of_torch=5) != first


def test_the_cost_is_that_of_steps_after_the_first_slow_ones_and_then_of_validation_too() -> None:
    _, run = scalar_fit([1.0], plain(epochs=5, validate_every=2), validate=lambda _: 0.0)
    found: list[Cost] = []
    now = 100.0
    watch = CostWatch(run, [found.append], clock=lambda: now)
    for seconds in (10, 10, 10, 1, 1, 1, 1, 1, 2):  # of which the first three do not count
        now += seconds
        watch.step(20)
    (early,) = found
    assert (early.epoch_seconds, early.validation_seconds, early.seconds) == (20, None, 5 * 20)
    now += 1 + 3  # of a tenth step, and of validation
    watch.step(20)
    epoch = Epoch(epoch=2, loss=0.0, seconds=40.0, events_per_second=1.0, validation_seconds=3.0)
    watch.epoch(epoch)
    assert found == [early]  # nothing was validated
    watch.epoch(replace(epoch, validation=0.5))
    assert found[1].epoch_seconds == pytest.approx(20 * (5 + 2 + 4 - 3) / 7)
    assert (found[1].validations, found[1].validation_seconds) == (3, 3)
    assert found[1].seconds == pytest.approx(5 * found[1].epoch_seconds + 3 * 3)
    assert replace(found[1], max_seconds=7.0).seconds == 7


def test_a_run_too_short_to_watch_says_no_cost() -> None:
    _, run = scalar_fit([1.0] * 3, plain(epochs=4))
    watch = CostWatch(run, [])
    run.run(on_step=lambda _, steps: watch.step(steps), on_epoch=watch.epoch)
    assert watch.cost is None


def test_memory_is_counted_by_what_it_is_for() -> None:
    # Of 6 rows, a product with (8, 4) weights keeps the rows, and the square keeps the product.
    rows, model = torch.ones(6, 8), nn.Linear(8, 4, bias=False)
    run = Fit(
        model,
        plain(),
        seed=0,
        plan=lambda _: Numbers([1.0] * 20),
        objective=lambda model, *_: model(rows).square().mean(),
    )
    found: list[Cost] = []
    ticks = iter(range(1000))
    watch = CostWatch(run, [found.append], clock=lambda: float(next(ticks)))
    run.run(on_step=lambda _, steps: watch.step(steps), on_epoch=watch.epoch)
    (cost,) = found
    assert cost.weight_bytes == 8 * 4 * 4
    assert cost.optimizer_bytes == 3 * cost.weight_bytes + 4  # gradient, two means, the step
    assert cost.batch_bytes == 6 * 8 * 4 + 6 * 4 * 4
    assert cost.process_bytes > 2**26


def test_memory_is_counted_where_gradients_hold_only_the_rows_of_a_batch() -> None:
    table = Dense(100, 4)
    run = Fit(
        table,
        plain(tables="lazy_adamw"),
        seed=0,
        plan=lambda _: Numbers([1.0] * 20),
        objective=lambda model, *_: model(torch.tensor([3, 5])).square().mean(),
    )
    found: list[Cost] = []
    ticks = iter(range(1000))
    watch = CostWatch(run, [found.append], clock=lambda: float(next(ticks)))
    run.run(on_step=lambda _, steps: watch.step(steps), on_epoch=watch.epoch)
    kept = sum(value.nbytes for value in run.optimizer.state[table.weight].values())
    assert found[0].optimizer_bytes == kept + 2 * 8 + 2 * 4 * 4  # two rows' numbers and gradients
    assert "for 1 epoch;" in str(found[0])


def test_watching_a_run_changes_nothing_of_it() -> None:
    plainly, run = sasrec_fit()
    run.run()
    watched, again = sasrec_fit()
    watch = CostWatch(again, [], clock=lambda: 0.0)
    again.run(on_step=lambda _, steps: watch.step(steps), on_epoch=watch.epoch)
    for name, value in plainly.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
