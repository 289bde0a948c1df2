"""A folder of results belongs to one run: the same settings go on there, others are refused."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rome.files import read_json, write_atomically


class ClaimError(ValueError):
    """The folder belongs to another run."""


def claim_folder(out: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Write OUT/run.json, or compare it with these settings where it is there.

    Args:
      out: folder of the run; made where it is missing.
      settings: JSON values that make the run this one.

    Raises:
      ClaimError: the folder belongs to a run with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    mine = json.loads(json.dumps(settings))
    path = out / "run.json"
    if not path.exists():
        write_atomically(path, json.dumps(mine, indent=1) + "\n")
        return
    theirs = read_json(path, "Give another --out.")
    different = sorted(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
    if different:
        name = different[0]
        raise ClaimError(
            f"{out} belongs to a run whose {name} is {theirs.get(name)!r}, not {mine.get(name)!r};"
            " give another --out"
        )
