"""`Trajectory`: a run as a file, its seed and one number a step and query.

The seed gives every direction, the number how far the weights went along it, so that `ZerothOrder.replay`
rebuilds them without data and without a forward pass.
"""

import json
import math
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class Trajectory:
    """The steps of a run.

    Args:
        coefficients: of each step, one number a query (NaN: skipped), as they were rounded to fp32 and
            applied.
        rates: learning rate of each step, where weights decay.
        about: what run this is.
    """

    def __init__(self, coefficients=(), rates=(), about: dict | None = None):
        self.coefficients = [list(row) for row in coefficients]
        self.rates = list(rates)
        self.about = dict(about or {})

    def append(self, coefficients: list[list[float]], rates: list[float], keep_rate: bool) -> None:
        """Add a step: the coefficients of each group, which must be the same, and the rate where asked."""
        if len({tuple(map(str, row)) for row in coefficients}) > 1 or len(set(rates)) > 1:
            self.about["uneven"] = True
        self.coefficients.append(coefficients[0])
        if keep_rate:
            self.rates.append(rates[0])

    def save(self, path, **about) -> None:
        """Write the file, with `about` added to what it says of the run.

        Raises:
            ValueError: groups had learning rates of their own.
        """
        if "uneven" in self.about:
            error = "groups with learning rates of their own: a trajectory has one number a step and query"
            raise ValueError(error)
        tensors = {"coefficients": torch.tensor(self.coefficients, dtype=torch.float32)}
        if self.rates:
            tensors["rates"] = torch.tensor(self.rates, dtype=torch.float64)
        save_file(tensors, path, metadata={"about": json.dumps({**self.about, **about})})

    @classmethod
    def load(cls, path) -> "Trajectory":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is no trajectory.
        """
        try:
            with safe_open(Path(path), framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
            return cls(tensors["coefficients"], tensors.get("rates", ()), about)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a trajectory: {error}") from error


def round_to_fp32(value: float) -> float:
    """Return the nearest single-precision number."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
