"""`ParamBlock`: what one direction runs through, a parameter or the fp32 master of a group of parameters."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zo import counter_rng


@dataclass(eq=False)
class ParamBlock:
    """One trained tensor, and the place of its elements in a direction.

    Args:
        param: the tensor that is updated. With a master: flat [n] fp32 on the host, all parameters of a
            group.
        offset: number of the tensor's first element in a direction.
        group: index of the optimizer's parameter group.
        weight_decay: λ.
        chunk_size: elements that are handled at once; 0 means `counter_rng.CHUNK_SIZE`.
        params: with a master, the parameters whose values it holds.
    """

    param: Tensor
    offset: int
    group: int
    weight_decay: float = 0.0
    chunk_size: int = 0
    params: list[Tensor] = field(default_factory=list)

    @property
    def as_rows(self) -> Tensor:
        """The tensor with rows along its first axis; a scalar is one row."""
        return self.param if self.param.dim() else self.param.view(1)

    @property
    def row_numel(self) -> int:
        """Elements of a row."""
        return self.as_rows.shape[1:].numel()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; what a master holds is brought there in one transfer."""
        return self.params[0].device if self.params else self.param.device

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat [n] or [copies, n] tensor in the shapes of the parameters of a master."""
        copies = flat.shape[:-1]
        sections = flat.split([p.numel() for p in self.params], dim=-1)
        return [section.view(*copies, *p.shape) for section, p in zip(sections, self.params, strict=True)]

    def write(self, flat: Tensor) -> None:
        """Write a flat [n] tensor into the parameters of a master."""
        for p, values in zip(self.params, self.split(flat.to(self.device)), strict=True):
            p.copy_(values)

    def row_chunks(self) -> list[range]:
        """Return the rows of the tensor in ranges of about `chunk_size` elements."""
        step = max(1, (self.chunk_size or counter_rng.CHUNK_SIZE) // self.row_numel)
        n = len(self.as_rows)
        return [range(first, min(first + step, n)) for first in range(0, n, step)]


def to_single_precision(values: Tensor) -> Tensor:
    """Return half-precision values in fp32, others as they are (the same tensor)."""
    return values.float() if values.element_size() < 4 else values
