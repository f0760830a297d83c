"""Rows of the tasks, and where the starter lies."""

import json
import os
from pathlib import Path

import pytest

# A few real rows of the eleven tasks; see the README.md there.
DATA = Path(__file__).resolve().parent.parent / "data"
STARTER = Path(os.environ.get("STARTER", Path(__file__).resolve().parents[2] / "starter"))
TRAIN = [
    ("a film of great warmth and wit", 1),
    ("tedious from the first minute to the last", 0),
    ("the best thing on a screen this year", 1),
    ("lifeless, loud and far too long", 0),
    ("funny, tender, and never once dull", 1),
    ("a mess without a single idea", 0),
    ("superb acting in every scene", 1),
    ("i wanted my money back", 0),
]


def write_rows(path: Path, rows) -> None:
    """Write (sentence, label) rows as SST2 has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"idx": i, "sentence": s, "label": y}) + "\n" for i, (s, y) in enumerate(rows))
    )


def starter(*parts) -> Path:
    """Return a path in the starter, or skip the test where the starter is not there."""
    path = STARTER.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the starter is not there ({path}): run 'make starter'")
    return path
