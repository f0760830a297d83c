"""Imported once by the server whose forks are the processes of tests: what takes seconds to import is there already."""

import gc

import run  # noqa: F401 - for the forks
import trainer  # noqa: F401 - for the forks

gc.collect()
gc.freeze()
