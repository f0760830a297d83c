"""`GradientScale`: clip a projected gradient, and divide it by its usual size."""

import math

MEAN_SQUARE_DECAY = 0.98  # of the running mean square of the projected gradient


class GradientScale:
    """Clip projected gradients g, then divide them by the root of a running mean of g².

    Args:
        clip: bound on |g|, applied first; 0 is off.
        normalize: whether to divide. The mean decays by 0.98 a g and is corrected for its start at 0.
    """

    def __init__(self, clip: float = 0.0, normalize: bool = False):
        self.clip = clip
        self.normalize = normalize
        self.reset()

    def reset(self) -> None:
        """Forget the running mean."""
        self.mean_square = 0.0
        self.weight = 1.0  # MEAN_SQUARE_DECAY ** (number of g), for the bias correction

    def scale(self, g: float) -> float:
        """Return g after clip and normaliser, and take it into the running mean; NaN for a NaN or ∞."""
        if not math.isfinite(g):
            return math.nan
        if self.clip:
            g = max(-self.clip, min(self.clip, g))
        if not self.normalize:
            return g
        self.mean_square = MEAN_SQUARE_DECAY * self.mean_square + (1 - MEAN_SQUARE_DECAY) * g * g
        self.weight *= MEAN_SQUARE_DECAY
        mean_square = self.mean_square / (1 - self.weight)
        return g / math.sqrt(mean_square) if mean_square else 0.0
