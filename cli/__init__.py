"""Flags, their defaults and rules, loading of models, result files."""

import utils  # noqa: F401 - sets the level of a logger before transformers imports peft, which logs there
