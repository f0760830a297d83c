"""TODO boosters.chain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Booster:
    """One round of one layer: A [r, in], B [out, r], fp32 on the host; its delta is scaling · B A."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def scaled_B(self) -> Tensor:
        """[out, r]: B with the scaling in it."""
        return self.B * self.scaling


Round = dict[str, Booster]  # {module name: its booster}, of the layers that the round adapts


def concat_factors(rounds: Sequence[Round], name: str, fold: bool) -> tuple[Tensor, Tensor]:
    """(A [R, in], B [out, R]) of a layer: its factors in all rounds, with or without scaling in B."""
    own = [boosters[name] for boosters in rounds if name in boosters]
    return torch.cat([b.A for b in own]), torch.cat([b.scaled_B if fold else b.B for b in own], dim=1)


def compress(rounds: Sequence[Round], rank: int) -> tuple[Round, float]:
    """The nearest LoRA of that rank to the sum of all rounds; what it lacks: ‖sum − LoRA‖ / ‖sum‖ (Frobenius, over all
    layers).

    With B = Q_b R_b and Aᵀ = Q_a R_a the singular values of B A are those of the small R_b R_aᵀ, so that the matrix
    itself is never made (fp64).
    """
    made, lost, whole = {}, 0.0, 0.0
    for name in dict.fromkeys(name for boosters in rounds for name in boosters):
        A, B = concat_factors(rounds, name, fold=True)
        q_b, r_b = torch.linalg.qr(B.double())
        q_a, r_a = torch.linalg.qr(A.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        kept, root = s[:rank], s[:rank].sqrt()
        u, vh = u[:, : len(kept)] * root, vh[: len(kept)] * root[:, None]
        made[name] = Booster((vh @ q_a.T).float(), (q_b @ u).float(), 1.0)
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
    most = max(len(b.A) for b in made.values())
    for name, b in made.items():  # every layer has the rank of the adapter, the missing part of it zeros
        more = most - len(b.A)
        made[name] = Booster(nn.functional.pad(b.A, (0, 0, 0, more)), nn.functional.pad(b.B, (0, more)), 1.0)
    return made, math.sqrt(lost / whole) if whole else 0.0
