"""The set `pro`: 200 proven tasks in eight domains, made again from their seeds when opened.

pro.json names family, seed and digest of each task; a generator that changed is noticed by the
digest. The seeds are public, so another set is for secret evaluations: `launch.synth --pro --seed
N` makes and proves one from a seed that nobody else has.
"""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import shutil
import tempfile
from typing import Any

from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.load import load_dataset
from envs.tasks.harbor.task import HarborTask
from envs.tasks.made import FAMILIES, write_draft

INDEX = pathlib.Path(__file__).with_name("pro.json")


@functools.cache
def load_pro(index: pathlib.Path = INDEX) -> tuple[HarborTask, ...]:
    """Return the tasks of the set, sorted by name. Their folders live as long as this process.

    Raises:
      TaskError: the index is not readable, or a generator makes another task than the proven one.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pro-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for entry in read_index(index):
        draft = FAMILIES[entry["family"]].make(entry["seed"])
        if draft.digest != entry["digest"]:
            raise TaskError(
                index,
                0,
                f"{draft.name}: its generator makes {draft.digest}, and {entry['digest']} was"
                " proven; prove the set again (docs/synthesis.md)",
            )
        write_draft(draft, folder / draft.name.replace("/", "-"))
    return tuple(load_dataset(folder))


def read_index(index: pathlib.Path) -> list[dict[str, Any]]:
    """Return the entries of an index: family, seed and digest of each task.

    Raises:
      TaskError: it is not such a file.
    """
    try:
        entries = json.loads(index.read_text())["tasks"]
        for entry in entries:
            if entry["family"] not in FAMILIES or not isinstance(entry["seed"], int):
                raise ValueError(f"entry {entry!r}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TaskError(index, 0, f"not an index of made tasks: {error}") from error
    return entries
