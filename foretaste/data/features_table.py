"""Encoded rows of features: what is looked up in a batch.

Shape legend: R rows, B picked rows, C single-valued fields (codes), G bags, N values of all bags,
M numbers, F fields of all kinds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldTable:
    """Rows of encoded features. Fields stand in the order codes, bags, numbers, vectors."""

    code_RC: Int64[Tensor, "R C"]
    """One code of the side's space for each single-valued field."""
    bag_N: Int64[Tensor, " N"]
    """Codes of all bags, row by row and, within a row, bag by bag; no bag is empty."""
    bag_offsets_RG1: Int64[Tensor, "R G1"]
    """Bag g of row r: `bag_N[bag_offsets_RG1[r, g] : bag_offsets_RG1[r, g + 1]]`."""
    number_RM: Float32[Tensor, "R M"]
    """Standardised; 0 where missing."""
    vectors: tuple[Float32[Tensor, "R _"], ...]
    """One matrix a vector field; zeros where missing."""
    present_RF: Bool[Tensor, "R F"]
    """Which fields say something: neither missing nor a value of which training taught nothing."""

    def __len__(self) -> int:
        return len(self.code_RC)

    @property
    def known_R(self) -> Bool[Tensor, " R"]:
        """Which rows have a feature that says something."""
        return self.present_RF.any(dim=1)

    def rows(self, row_B: Int64[Tensor, " B"]) -> "FieldTable":
        """Return some rows, in the order given; each in `[0, R)`."""
        offsets_BG1 = self.bag_offsets_RG1.index_select(0, row_B)
        start_B = offsets_BG1[:, 0]
        length_B = offsets_BG1[:, -1] - start_B
        first_B = length_B.cumsum(0) - length_B
        shift_B = start_B - first_B
        place_N = torch.arange(int(length_B.sum()), device=row_B.device)
        return FieldTable(
            code_RC=self.code_RC.index_select(0, row_B),
            bag_N=self.bag_N[place_N + shift_B.repeat_interleave(length_B)],
            bag_offsets_RG1=offsets_BG1 - shift_B.unsqueeze(1),
            number_RM=self.number_RM.index_select(0, row_B),
            vectors=tuple(vector.index_select(0, row_B) for vector in self.vectors),
            present_RF=self.present_RF.index_select(0, row_B),
        )

    def to(self, device: torch.device) -> "FieldTable":
        """Return the table on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return of_tensors(tensors, len(self.vectors))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a name of its own."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vectors"}
        return plain | {f"vector-{n}": vector for n, vector in enumerate(self.vectors)}


def concat_rows(tables: Sequence[FieldTable]) -> FieldTable:
    """Put tables of one side one below the other; there is at least one."""
    parts = [table.tensors() for table in tables]
    before = 0
    for part in parts:
        part["bag_offsets_RG1"] = part["bag_offsets_RG1"] + before
        before += len(part["bag_N"])
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return of_tensors(together, len(tables[0].vectors))


def of_tensors(tensors: Mapping[str, Tensor], num_vectors: int) -> FieldTable:
    """Make a table of what `FieldTable.tensors` gave."""
    return FieldTable(
        code_RC=tensors["code_RC"],
        bag_N=tensors["bag_N"],
        bag_offsets_RG1=tensors["bag_offsets_RG1"],
        number_RM=tensors["number_RM"],
        vectors=tuple(tensors[f"vector-{n}"] for n in range(num_vectors)),
        present_RF=tensors["present_RF"],
    )
