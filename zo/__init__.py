"""Zeroth-order training: fit any torch module with forward passes only (MeZO, arXiv 2305.17333)."""

from zo.methods import AR1ZO, FZOO, LOZO, METHODS, Method
from zo.optimizer import ZerothOrder
from zo.trajectory import Trajectory

__all__ = ["AR1ZO", "FZOO", "LOZO", "METHODS", "Method", "Trajectory", "ZerothOrder"]
