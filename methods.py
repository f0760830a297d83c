"""Zeroth-order methods other than plain MeZO, each a few lines on the seam of `zo.Method`.

`--zo_method NAME` takes one of these, `--zo_method file.py:Name` a subclass of `zo.Method` in a file of one's own.
"""

import importlib.util
from pathlib import Path

from utils import UsageError
from zo import Method, Noise, Slot


class LOZO(Method):
    """Low-rank directions for full weights, lazily resampled (arXiv 2410.07698, Algorithm 1).

    z of a matrix is U Vᵀ / √r with U [m, r] fresh in every step and V [n, r] drawn anew every `interval` steps, so that
    the updates of an interval add up to one of rank r. The factor gives its elements variance 1, as full directions
    have. Vectors get full directions.
    """

    full_only = True
    rank, interval = 2, 50

    def direction(self, noise: Noise, slot: Slot, step: int, query: int, rows, device):
        if slot.matrix.dim() != 2:
            return super().direction(noise, slot, step, query, rows, device)
        r = self.rank
        u = noise.rows((step, query, "U"), slot.offset * r, r, rows, device)
        v = noise.rows((step // self.interval, "V"), slot.offset * r, r, range(slot.width), device)
        return u @ v.T / r**0.5


METHODS = {"mezo": Method, "lozo": LOZO}


def get_method(name: str) -> type[Method]:
    """The method of that name, or of a file; raises UsageError where there is none."""
    if name in METHODS:
        return METHODS[name]
    path, _, attribute = name.rpartition(":")
    if not path or not Path(path).is_file():
        raise UsageError(f"--zo_method {name}: there are {', '.join(METHODS)}, or file.py:Name")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UsageError(f"--zo_method {name}: {path} has no subclass of zo.Method called {attribute!r}")
    return found
