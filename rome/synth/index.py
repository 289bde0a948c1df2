"""Makes the index of a set from runs of the pipeline: seeds and digests instead of folders."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from envs.tasks.harbor import load_task
from envs.tasks.made import FAMILIES
from rome.files import write_atomically


def write_index(runs: Sequence[pathlib.Path], path: pathlib.Path, keep: int) -> dict[str, int]:
    """Write an index of the accepted tasks of runs, and return the number of each domain.

    Args:
      runs: their OUT folders; earlier ones go first.
      path: of the index (envs/tasks/made/pro.py).
      keep: tasks of each domain at most.

    Raises:
      ValueError: a generator makes another task today than the one that was accepted.
    """
    families = {module.make(0).domain: name for name, module in FAMILIES.items()}
    counts: dict[str, int] = {}
    entries: dict[str, dict[str, Any]] = {}
    for run in runs:
        for folder in sorted((run / "tasks").iterdir()):
            task = load_task(folder)
            family = families.get(task.category)
            seed, digest = task.metadata.get("seed"), task.metadata["digest"]
            if family is None or seed is None or digest in entries:
                continue
            if counts.get(task.category, 0) >= keep:
                continue
            if FAMILIES[family].make(seed).digest != digest:
                raise ValueError(
                    f"{folder}: {family} makes another task from seed {seed} than the accepted one;"
                    " run the pipeline again"
                )
            counts[task.category] = counts.get(task.category, 0) + 1
            entries[digest] = {"family": family, "seed": seed, "digest": digest}
    lines = [json.dumps(entry) for entry in entries.values()]
    write_atomically(path, '{"tasks": [\n' + ",\n".join(lines) + "\n]}\n")
    return counts
