"""TorchRec as the engine of sharded tables: its plan, its look-ups and its fused optimizer.

A `Sharded` table lends its rows to TorchRec during training: both use the same memory, so that
checkpoints, maps and everything else are those of our own engine. TorchRec updates the rows within
the backward pass, by row-wise Adagrad with our equations; settings that need complete gradients
first raise an error.

Shape legend: N requested rows, R rows of this process, D width.

References:
    Ivchenko et al., "TorchRec: a PyTorch Domain Library for Recommendation Systems", RecSys 2022,
    https://doi.org/10.1145/3523227.3547387.
"""

import logging
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, distributed

from foretaste.data.draws import WHOLE
from foretaste.errors import ConfigError
from foretaste.training import processes
from foretaste.training.settings import AdamWByRows, TrainingConfig
from foretaste.training.sharded import Sharded

_VERSION = "1.8"
_NAME, _ROW = "table", "row"


def lend_to_torchrec(
    tables: Sequence[Sharded], config: TrainingConfig, optimizer: AdamWByRows
) -> list["Lent"]:
    """Let TorchRec look up and update the rows of sharded tables, if there are several processes.

    Args:
        tables: The model's sharded tables; a single process has none.
        config: Settings with TorchRec as the `engine`.
        optimizer: The optimizer, whose state of these rows becomes TorchRec's.

    Raises:
        ConfigError: TorchRec in the right version is not installed, or a setting needs complete
            gradients.
    """
    if processes.share() == WHOLE:
        return []
    _check(config)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    for talkative in ("torch.fx", "torchrec"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    return [Lent(table, config, optimizer) for table in tables]


def _check(config: TrainingConfig) -> None:
    try:
        found = version("torchrec")
    except PackageNotFoundError:
        found = "not installed"
    if not found.startswith(f"{_VERSION}."):
        raise ConfigError(
            f'training.engine is "torchrec", and TorchRec is {found}: foretaste works with '
            f"{_VERSION}, which `make torchrec` installs",
            name="training.engine",
            value=found,
        )
    moves = "TorchRec updates rows within the backward pass"
    wanted: dict[str, tuple[object, object, str]] = {
        "tables": (config.tables, "row_adagrad", "it has row-wise Adagrad alone"),
        "gradient_clip": (config.gradient_clip, None, f"{moves}, before there is a norm"),
        "weight_decay": (config.weight_decay, 0, f"{moves}, without AdamW's decay"),
        "ema_decay": (config.average_decay, 0, "an average needs all rows in each step"),
        "precision": (config.precision, "fp32", f"{moves}, before a loss is unscaled"),
    }
    for name, (value, needed, reason) in wanted.items():
        if value != needed:
            shown = "out" if needed is None else f"to {needed!r}"
            raise ConfigError(
                f'training.engine is "torchrec" and training.{name} is {value!r}: {reason}: '
                f"{'leave it' if needed is None else 'set it'} {shown}, or leave out "
                "training.engine",
                name=f"training.{name}",
                value=value,
            )
    if config.sharded_from is None:
        raise ConfigError(
            'training.engine is "torchrec", which has the tables that are sharded: set '
            "training.sharded_from",
            name="training.sharded_from",
        )


@final
class Lent:
    """A sharded table that is lent to TorchRec."""

    def __init__(self, table: Sharded, config: TrainingConfig, optimizer: AdamWByRows) -> None:
        import torchrec  # noqa: PLC0415  # an extra
        from torchrec.distributed.comm_ops import set_gradient_division  # noqa: PLC0415
        from torchrec.distributed.embeddingbag import (  # noqa: PLC0415
            EmbeddingBagCollectionSharder,
        )
        from torchrec.distributed.planner import (  # noqa: PLC0415
            EmbeddingShardingPlanner,
            Topology,
        )
        from torchrec.optim import RowWiseAdagrad  # noqa: PLC0415
        from torchrec.optim.apply_optimizer_in_backward import (  # noqa: PLC0415
            apply_optimizer_in_backward,
        )

        class ByRows(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # TorchRec has no types
            """A sharder that distributes rows on a CPU too."""

            def sharding_types(self, compute_device_type: str) -> list[str]:
                return ["row_wise"]

        set_gradient_division(False)  # gradients are summed, not averaged
        self.table, self.is_read = table, False
        self._bags = torchrec.KeyedJaggedTensor
        settings = torchrec.EmbeddingBagConfig(
            name=_NAME,
            embedding_dim=table.width,
            num_embeddings=table.num_rows,
            feature_names=[_ROW],
        )
        bags = torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=[settings])
        rate = {"lr": config.rate, "eps": optimizer.param_groups[0]["eps"]}
        apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), rate)
        sharders = [ByRows()]
        topology = Topology(world_size=processes.share().world, compute_device="cpu")
        plan = EmbeddingShardingPlanner(topology=topology).collective_plan(
            bags, sharders, distributed.group.WORLD
        )
        self._model = torchrec.distributed.DistributedModelParallel(
            bags, device=torch.device("cpu"), plan=plan, sharders=sharders
        )
        self._share(optimizer)
        table.look_up_by = self

    @torch.no_grad()
    def _share(self, optimizer: AdamWByRows) -> None:
        """Make table, optimizer and TorchRec use the same memory."""
        name = f"embedding_bags.{_NAME}.weight"
        (rows,) = self._model.state_dict()[name].local_shards()
        rows.tensor.copy_(self.table.weight)
        self.table.weight.data = rows.tensor
        state = self._model.fused_optimizer.state_dict()["state"][name]
        (sums,) = state[f"{_NAME}.momentum1"].local_shards()
        self._sum_R = sums.tensor
        optimizer.state[self.table.weight] = {"sum": self._sum_R, "step": torch.zeros(())}

    @torch.no_grad()
    def restore(self, optimizer: AdamWByRows) -> None:
        """Take the optimizer's state of the rows from a restored checkpoint."""
        state = optimizer.state[self.table.weight]
        self._sum_R.copy_(state["sum"])
        state["sum"] = self._sum_R

    def begin_step(self, rate: float) -> None:
        """Set the learning rate of the step."""
        self.is_read = False
        for group in self._model.fused_optimizer.param_groups:
            group["lr"] = rate
        self._model.fused_optimizer.step()

    def __call__(self, row_N: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Return rows, with a gradient that updates them; row -1 is 0.

        Raises:
            ConfigError: The step has already read the table.
        """
        if self.is_read:
            raise ConfigError(
                "the model reads a table twice in a step, and TorchRec would update it at each "
                "time: leave out training.engine",
                name="training.engine",
                value="torchrec",
            )
        self.is_read = True
        num, real_N = processes.most_of_all(len(row_N)), row_N >= 0
        length_N = row_N.new_zeros(max(1, num))
        length_N[: len(row_N)] = real_N
        bags = self._bags(keys=[_ROW], values=row_N[real_N], lengths=length_N)
        looked_ND: Tensor = self._model(bags).wait()[_ROW]
        return looked_ND[: len(row_N)]
