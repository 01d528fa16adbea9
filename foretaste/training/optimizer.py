"""How a step moves the weights: AdamW, its learning rate, and the average that follows behind."""

import math
from typing import Any

import torch
from torch import nn, optim

from foretaste.training.settings import TrainingConfig


def make_optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> optim.AdamW:
    """Return AdamW, which decays matrices and tables, but no biases and scales."""
    decayed = [p for p in parameters if p.requires_grad and p.ndim > 1]
    others = [p for p in parameters if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": others, "weight_decay": 0.0},
    ]
    return optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def rate_factor(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate's factor: a rise from 0, then the schedule, down to 0.02."""
    done = step / (steps_per_epoch * config.epochs)
    after = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
        "linear": 1 - done,
    }[config.schedule]
    warmup = config.warmup_of(steps_per_epoch)
    return min(1.0, (step + 1) / (warmup + 1)) * max(0.02, after)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the weights; early on it moves faster, so that it forgets 0."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
