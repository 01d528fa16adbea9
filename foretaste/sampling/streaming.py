"""How often items come by in a stream of batches, where nobody can count them.

Shape legend: N rows, M distinct items, I items, K hashes, C cells.
"""

from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foretaste.config import Seed
from foretaste.sampling.distinct import Drawn

_PRIME = 2**31 - 1


@final
class StreamedFrequency(nn.Module):
    r"""Gives the distinct items of a batch, with chances estimated from the stream alone.

    An item that comes by every :math:`\delta` steps is in a batch with chance
    :math:`1 / \delta`. For each item a cell keeps the step when it was last seen and a moving
    average of the gaps:

    .. math:: \delta \leftarrow (1 - \alpha) \delta + \alpha (t - t_{last})

    Items are hashed to cells, so memory does not grow with the catalogue. Two items in one cell
    look more frequent than they are; of several hashes the largest gap is believed.

    Its state are buffers: a checkpoint that holds them goes on where it stopped.

    References:
        Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
        Recommendations", RecSys 2019, algorithms 2 and 3,
        https://doi.org/10.1145/3298689.3346996. Departures: the first :math:`1/\alpha` gaps of a
        cell are averaged plainly, so that its first guess does not linger; before its first gap
        an item's is the number of steps so far; and a cell moves once a step, however many of
        its items the batch has.
    """

    def __init__(
        self,
        num_items: int,
        *,
        num_cells: int,
        num_hashes: int = 2,
        rate: float = 0.01,
        seed: Seed = 0,
    ) -> None:
        """Prepare to watch.

        Args:
            num_items: The catalogue.
            num_cells: Cells of each hash; as many as items, or fewer.
            num_hashes: Hashes, 1 or more.
            rate: alpha, in (0, 1]: weight of the newest gap.
            seed: Decides the hashes.
        """
        super().__init__()
        self.rate = rate
        generator = torch.Generator().manual_seed(seed)
        factor_K1 = torch.randint(1, _PRIME, (num_hashes, 1), generator=generator)
        shift_K1 = torch.randint(_PRIME, (num_hashes, 1), generator=generator)
        cell_KI = (factor_K1 * torch.arange(num_items) + shift_K1) % _PRIME % num_cells
        self.cell_KI: Tensor
        self.step: Tensor
        self.last_KC: Tensor
        self.gap_KC: Tensor
        self.num_gaps_KC: Tensor
        first_K1 = torch.arange(num_hashes).unsqueeze(1) * num_cells
        self.register_buffer("cell_KI", cell_KI + first_K1, persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_KC", torch.zeros(num_hashes, num_cells, dtype=torch.int64))
        self.register_buffer("gap_KC", torch.zeros(num_hashes, num_cells, dtype=torch.float64))
        self.register_buffer("num_gaps_KC", torch.zeros(num_hashes, num_cells, dtype=torch.int64))

    def draw(self, target_N: Int64[Tensor, " N"]) -> Drawn:
        """Take one step of the stream; return the batch's distinct items."""
        item_M = target_N.unique()
        self.watch(item_M)
        return Drawn(item_M, self.chance)

    @torch.no_grad()
    def watch(self, item_M: Int64[Tensor, " M"]) -> None:
        """Note that a step had these items."""
        self.step += 1
        cell = self.cell_KI[:, item_M].flatten().unique()
        last, gap, num = self.last_KC.view(-1), self.gap_KC.view(-1), self.num_gaps_KC.view(-1)
        again = cell[last[cell] > 0]
        num[again] += 1
        weight = num[again].double().reciprocal().clamp(min=self.rate)
        gap[again] = gap[again].lerp((self.step - last[again]).double(), weight)
        last[cell] = self.step

    @torch.no_grad()
    def chance(self, item_X: Int64[Tensor, "*X"]) -> Float[Tensor, "*X"]:
        """Return items' chances to be in a batch, in [0, 1]; 0 for items never seen."""
        cell_KX = self.cell_KI[:, item_X]
        last, gap, num = (
            kept.view(-1)[cell_KX] for kept in (self.last_KC, self.gap_KC, self.num_gaps_KC)
        )
        gap_KX = gap.where(num > 0, self.step.double()).where(last > 0, torch.inf)
        return gap_KX.amax(dim=0).clamp(min=1).reciprocal().float()
