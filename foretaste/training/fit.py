"""The training loop, one for all models that learn by gradient descent."""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from foretaste.data.draws import step_generator
from foretaste.data.plans import Plan
from foretaste.errors import ConfigError, NonFiniteError
from foretaste.models.layers.table import OwnRows
from foretaste.training import processes
from foretaste.training.checkpoint import (
    CHECKPOINT,
    Epoch,
    Progress,
    find_checkpoint,
    forget_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from foretaste.training.progress import Prefetch, StepLog
from foretaste.training.settings import (
    TrainingConfig,
    choose_device,
    clip,
    gradients,
    keep_memory,
    make_optimizer,
    move_average,
    rate_factor,
    refuse_at_rest,
)
from foretaste.training.sharded import Sharded, map_tables, mapped, own_rows_of
from foretaste.training.torchrec import lend_to_torchrec

Network = TypeVar("Network", bound=nn.Module)
Batch = TypeVar("Batch", covariant=True)
_MOST_BAD_STEPS = 20
_PATIENT_EPOCHS, _PATIENT_STEPS = 5, 300
"""With `patience = "auto"`, patience covers the validations of this many epochs and steps."""
_TRIALS, _GAIN = 5, 0.9
"""With `precision = "auto"`: how often a batch is timed, and the largest time of bf16 relative to
fp32 for which bf16 is taken."""
_LAST = 3
"""With `patience = "auto"`, the mean of this many validations is watched."""
_PLATEAU = 5
"""Factor on patience while the metric is at popularity's level: models that learn popularity first
may stay at this level for long before they improve."""
OUT_OF_TIME = "out of time"
"""The start of `Progress.done` if a run ended at its time limit."""


class Refreshed(ABC):
    """Data that are computed from the weights and used for an epoch or longer, such as hard
    negatives. They are part of a run's state.
    """

    @abstractmethod
    def refresh(self, model: Any, epoch: int) -> None:
        """Compute the data again before the first step of an epoch (0, 1, …), if it is due."""

    @abstractmethod
    def is_due(self, epoch: int, batch: int) -> bool:
        """Return whether a computation in a thread alongside training starts before a step."""

    @abstractmethod
    def start(self, model: Any, batch: int) -> None:
        """Start the computation in a thread, with a copy of the model in evaluation mode."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Return the state for a checkpoint."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state that `state` returned."""


@final
class Fit(Generic[Network, Batch]):
    """One run: `run()` trains `model` in place and leaves it with its best weights.

    The state after any step depends only on the settings, the seed and the data, so a run that was
    killed and resumed gives bit-identical weights on a CPU.
    """

    def __init__(
        self,
        model: Network,
        config: TrainingConfig,
        *,
        seed: int,
        plan: Callable[[int], Plan[Batch]],
        objective: Callable[[Network, Batch, torch.Generator], Tensor],
        validate: Callable[[Network], float] | None = None,
        validate_every: int | None = None,
        level: float = -math.inf,
        folder: Path | None = None,
        refreshed: Refreshed | None = None,
        data: str = "",
    ) -> None:
        """Prepare a run.

        Args:
            model: Trained in place.
            config: The training settings.
            seed: Determines order, dropout and negatives, but not the model's initial weights.
            plan: Returns the batches of an epoch, given its number (0, 1, …); they depend only on
                the seed and the number.
            objective: Returns the mean loss of a batch, a scalar in nats; it draws from the
                generator that it is given. If it is a module, its parameters are trained together
                with the model's, and its state is in the checkpoint.
            validate: Returns the metric for early stopping, higher is better.
            validate_every: Epochs between two validations if the setting is "auto"; 1 if None.
            level: The metric of a model that ranks by popularity.
            folder: Folder of checkpoints and of the log of steps; None writes neither.
            refreshed: Data for batches that are computed from the weights, the same weights
                that validation uses.
            data: A fingerprint of the training data: a run on other data is not resumed.
        """
        keep_memory()
        self.device = choose_device(config.device)
        self.model, self.config, self.seed = model.to(self.device), config, seed
        self.plan, self.objective, self.validate, self.folder = plan, objective, validate, folder
        if isinstance(objective, nn.Module):
            objective.to(self.device)
        every = config.validate_every
        self.validate_every = (validate_every or 1) if every == "auto" else every
        self.refreshed, self.data, self.level = refreshed, data, level
        measured = config.precision == "auto"
        self.progress = Progress(precision="" if measured else config.precision)
        self.average = copy.deepcopy(model) if config.average_decay else None
        self.best_weights: dict[str, Tensor] = {}
        self.of_objective = list(objective.parameters()) if isinstance(objective, nn.Module) else []
        tables = [module for module in model.modules() if isinstance(module, OwnRows)]
        self.sharded = [table for table in tables if isinstance(table, Sharded)]
        self.dealt = [table.weight for table in self.sharded]
        self.common = [p for p in model.parameters() if all(p is not own for own in self.dealt)]
        self.parameters = [*model.parameters(), *self.of_objective]
        refuse_at_rest(model)
        self.optimizer = make_optimizer(self.parameters, config, tables=tables)
        self.own = own_rows_of(model, self.optimizer) if self.sharded else {}
        is_own = config.engine == "own"
        self.lent = [] if is_own else lend_to_torchrec(self.sharded, config, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def run(
        self,
        *,
        resume: bool = False,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_step: Callable[[Progress, int], None] | None = None,
        max_seconds: float | None = None,
    ) -> Progress:
        """Train for all epochs, or until validation stops improving.

        Args:
            resume: Continue from the folder's checkpoint, if there is one.
            on_epoch: Called with each epoch when it ends; an exception from it ends the run.
            on_step: Called with each step's number and the number of steps in its epoch.
            max_seconds: Time limit in seconds, including validations. After it, the current epoch
                ends, is validated, and is the last; such a run also depends on the clock.

        Raises:
            NonFiniteError: Twenty steps in a row had no finite loss or gradient, or the final
                weights are not finite.
            ConfigError: `resume` was set without a folder.
        """
        if resume:
            self._restore()
        elif self.folder is not None and processes.is_first():
            forget_checkpoint(self.folder)
        processes.check_same(self._facts() | {"step": self.progress.step})
        logged_in = self.folder if processes.is_first() else None
        with StepLog(logged_in, self.progress.step) as log:
            while not self.progress.done:
                self._epoch(log, on_epoch, on_step, max_seconds)
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            self.model.load_state_dict(self._judged().state_dict())
        self._refuse_broken_weights()
        self.model.eval()
        if self.sharded:
            map_tables(self.model, self._file("trained.safetensors"))
        return self.progress

    def _file(self, name: str) -> Path | None:
        """Return the place of a file of tables, which the next one of its name replaces."""
        return None if self.folder is None else self.folder / name

    def _refuse_broken_weights(self) -> None:
        ends = [torch.stack(each.aminmax()) for each in self.model.parameters() if each.numel()]
        if not all(bool(each.isfinite().all()) for each in ends):
            raise NonFiniteError(
                "training ended with weights that are NaN or infinite: lower "
                "training.learning_rate or set training.gradient_clip",
                name="learning_rate",
                value=self.config.rate,
            )

    def _epoch(
        self,
        log: StepLog,
        on_epoch: Callable[[Epoch], None] | None,
        on_step: Callable[[Progress, int], None] | None,
        max_seconds: float | None,
    ) -> None:
        progress, started = self.progress, time.perf_counter()
        if self.refreshed is not None and progress.batch == 0:
            self.refreshed.refresh(self._judged(), progress.epoch)
        plan, first_batch = self.plan(progress.epoch), progress.batch
        seconds_before = progress.seconds
        self.model.train()
        with Prefetch(plan, producers=self.config.producers, first=first_batch) as batches:
            self._steps(batches, len(plan), log, on_step, max_seconds)
        self.optimizer.settle()
        trained_s = time.perf_counter() - started
        rate = plan.num_events * (progress.batch - first_batch) / len(plan) / trained_s
        validation = self._validate(len(plan))
        validation_s = time.perf_counter() - started - trained_s
        progress.seconds = seconds_before + time.perf_counter() - started
        epoch = Epoch(
            epoch=progress.epoch + 1,
            loss=progress.loss_sum / progress.counted if progress.counted else math.nan,
            seconds=progress.seconds,
            events_per_second=rate,
            validation=validation,
            validation_seconds=validation_s,
            waiting_share=batches.waited_s / trained_s,
        )
        progress.epochs.append(asdict(epoch))
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss_sum, progress.counted = 0.0, 0
        all_done = "all epochs done" if progress.epoch == self.config.rounds else ""
        progress.done = progress.done or all_done or self._out_of_time(max_seconds)
        self._checkpoint()
        if on_epoch:
            on_epoch(epoch)

    def _steps(
        self,
        batches: Prefetch[Batch],
        steps_per_epoch: int,
        log: StepLog,
        on_step: Callable[[Progress, int], None] | None,
        max_seconds: float | None,
    ) -> None:
        """Run the remaining steps of an epoch."""
        progress, seconds_before = self.progress, self.progress.seconds
        started = last_checkpoint = time.perf_counter()
        while progress.batch < steps_per_epoch and not progress.done:
            self._start_refresh()
            batch = batches.next()
            if not progress.precision:
                progress.precision = self._measured_precision(batch)
            generator = step_generator(self.seed, progress.epoch, progress.batch)
            loss = self._step(batch, steps_per_epoch, generator)
            log.write(progress.step, progress.epoch, loss)
            if math.isfinite(loss):
                progress.loss_sum += loss
                progress.counted += 1
            progress.batch += 1
            progress.step += 1
            now = time.perf_counter()
            progress.seconds = seconds_before + now - started
            if on_step:
                on_step(progress, steps_per_epoch)
            if self._due(now - last_checkpoint):
                self._checkpoint()
                last_checkpoint = now
            progress.done = self._out_of_time(max_seconds)

    def _start_refresh(self) -> None:
        """Start the computations that are due, with the current weights, in their threads."""
        refreshed, progress = self.refreshed, self.progress
        if refreshed is not None and refreshed.is_due(progress.epoch, progress.batch):
            self.optimizer.settle()
            refreshed.start(copy.deepcopy(self._judged()), progress.batch)
            self.model.train()

    def _due(self, seconds: float) -> bool:
        """Return whether a checkpoint is due; of several processes, the first one decides."""
        due = seconds >= self.config.checkpoint_seconds
        if self.dealt and self.folder:
            return bool(processes.by_first(lambda: due, at_once=True))
        return due

    def _out_of_time(self, max_seconds: float | None) -> str:
        spent_s, most_s = self.progress.seconds, max_seconds
        if most_s is None or not processes.by_first(lambda: spent_s >= most_s, at_once=True):
            return ""
        return f"{OUT_OF_TIME}: stopped after {spent_s:.1f} s"

    def _step(self, batch: Any, steps_per_epoch: int, generator: torch.Generator) -> float:
        """Take an optimizer step, unless the loss is not finite; return the loss."""
        progress, config = self.progress, self.config
        rate = config.rate * rate_factor(config, progress.step, steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for table in self.lent:
            table.begin_step(rate)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast(progress.precision), processes.dealt(batch):
            loss = self.objective(self.model, batch.to(self.device), generator)
        value = loss.item()
        if finite := math.isfinite(value):
            self.scaler.scale(loss).backward()
            processes.add_gradients(self.common, shared=self.of_objective)
            self.scaler.unscale_(self.optimizer)
            common, dealt = gradients([*self.common, *self.of_objective]), gradients(self.dealt)
            norm = processes.norm_of_all(common, dealt)
            if config.gradient_clip is not None:
                clip([*common, *dealt], norm, config.gradient_clip)
            finite = bool(norm.isfinite())
            if finite or self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
                self.scaler.update()
        progress.skipped += not finite
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        if progress.bad_in_a_row >= _MOST_BAD_STEPS:
            raise NonFiniteError(
                f"{_MOST_BAD_STEPS} steps in a row were not finite (loss {value}, step "
                f"{progress.step}): lower training.learning_rate or set training.gradient_clip",
                name="learning_rate",
                value=self.config.learning_rate,
            )
        if finite and self.average is not None:
            self.optimizer.settle()
            move_average(self.average, self.model, config.average_decay, progress.step)
        return value

    def _autocast(self, precision: str) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def _measured_precision(self, batch: Any) -> str:
        """Time forward and backward passes of a batch; the run's state is unchanged."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
        for precision in ("fp32", "bf16") * (1 + _TRIALS):  # the first two calls are slower
            generator = step_generator(self.seed, self.progress.epoch, self.progress.batch)
            started = clock()
            with self._autocast(precision), processes.dealt(batch):
                loss = self.objective(self.model, batch.to(self.device), generator)
            loss.backward()
            loss.item()  # wait for the GPU
            seconds[precision].append(clock() - started)
            self.optimizer.zero_grad(set_to_none=True)
        for buffer, kept in buffers:
            buffer.copy_(kept)
        fp32, bf16 = (min(times[1:]) for times in seconds.values())
        return "bf16" if processes.by_first(lambda: bf16 <= _GAIN * fp32) else "fp32"

    def _validate(self, steps_per_epoch: int) -> float | None:
        progress, config = self.progress, self.config
        number = progress.epoch + 1
        is_last = number == config.rounds or progress.done
        if self.validate is None or (number % self.validate_every and not is_last):
            return None
        judged, file = self._judged(), self._file("validated.safetensors")
        whole = mapped(judged, file) if self.sharded else nullcontext()
        with processes.work_divided(), whole:
            found = self.validate(judged)
        value = processes.by_first(lambda: found, at_once=True)
        if value > progress.best:
            progress.best, progress.best_epoch = value, number
            self.best_weights = {
                name: tensor.detach().clone() for name, tensor in judged.state_dict().items()
            }
        self._wait(value, self._patience(steps_per_epoch))
        return value

    def _wait(self, value: float, patience: int | None) -> None:
        """Count validations without improvement, and end the run after too many."""
        progress = self.progress
        progress.last = [*progress.last, value][-_LAST:]
        if self.config.patience == "auto":
            value = sum(progress.last) / len(progress.last)
        if value > progress.watched:
            progress.watched, progress.waited = value, 0
            return
        progress.waited += 1
        if patience is not None and progress.waited >= patience:
            since = f"epoch {progress.best_epoch} ({progress.best:.5f})"
            progress.done = f"no better validation since {since}"

    def _patience(self, steps_per_epoch: int) -> int | None:
        """Return how many validations in a row may bring no improvement."""
        if self.config.patience != "auto":
            return self.config.patience
        epochs = max(_PATIENT_EPOCHS, math.ceil(_PATIENT_STEPS / steps_per_epoch))
        patience = max(2, math.ceil(epochs / self.validate_every))
        return patience if self.progress.best > self.level else _PLATEAU * patience

    def _judged(self) -> Network:
        """Yield the model with the weights that validation uses, in evaluation mode.

        Buffers, such as the moving means of batch normalisation, are the model's current ones.
        """
        if self.average is None:
            return self.model.eval()
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        others = {n: value for n, value in self.model.state_dict().items() if n not in weights}
        self.average.load_state_dict(others, strict=False)
        return self.average.eval()

    def _checkpoint(self) -> None:
        if self.folder is None or not (self.own or processes.is_first()):
            return
        step, optimizer = self.progress.step, self.optimizer.state_dict()["state"]
        parts: dict[str, Mapping[str, Tensor]] = {
            f"model-{step}": self.model.state_dict(),
            f"best-{self.progress.best_epoch}": self.best_weights,
            f"average-{step}": {} if self.average is None else self.average.state_dict(),
            f"objective-{step}": self._objective_state(),
            f"refreshed-{step}": {} if self.refreshed is None else self.refreshed.state(),
            f"optimizer-{step}": {
                f"{index}.{name}": value
                for index, values in optimizer.items()
                for name, value in values.items()
            },
        }
        facts = {
            "progress": asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            **self._facts(),
        }
        kept = {name: tensors for name, tensors in parts.items() if tensors}
        write_checkpoint(self.folder / CHECKPOINT, kept, facts, own=self.own)

    def _facts(self) -> dict[str, Any]:
        """Return the facts that determine a run."""
        settings = self.config.model_dump(mode="json")
        return {"settings": settings, "seed": self.seed, "data": self.data}

    def _objective_state(self) -> Mapping[str, Tensor]:
        return self.objective.state_dict() if isinstance(self.objective, nn.Module) else {}

    def _restore(self) -> None:
        if self.folder is None:
            raise ConfigError("to resume, pass the folder of the checkpoint", name="folder")
        path = find_checkpoint(self.folder)
        if path is None:
            return
        parts, facts = read_checkpoint(path, own=self.own)
        self._check_same(path, facts)
        self.model.load_state_dict(parts["model"])
        best = parts.get("best", {})
        self.best_weights = {name: value.to(self.device) for name, value in best.items()}
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        if isinstance(self.objective, nn.Module):
            self.objective.load_state_dict(parts.get("objective", {}))
        if self.refreshed is not None:
            self.refreshed.restore(parts.get("refreshed", {}))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts.get("optimizer", {}).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for table in self.lent:
            table.restore(self.optimizer)
        self.scaler.load_state_dict(facts["scaler"])
        self.progress = Progress(**facts["progress"])

    def _check_same(self, path: Path, facts: Mapping[str, Any]) -> None:
        if facts.get("data", self.data) != self.data:
            raise ConfigError(
                f"{path} was trained on other events: resume with the same events, or start again "
                "without --resume",
                name="resume",
                value=True,
            )
        then = {**facts["settings"], "seed": facts["seed"]}
        now = self.config.model_dump(mode="json", exclude={"sharded_from", "engine"})
        now["seed"] = self.seed
        changed = [name for name in now if then.get(name) != now[name]]
        if changed:
            said = ", ".join(f"{name} {then.get(name)}, not {now[name]}" for name in changed)
            raise ConfigError(
                f"{path} was trained with {said}: resume with the same settings, or start again "
                "without --resume",
                name=changed[0],
                value=now[changed[0]],
            )
