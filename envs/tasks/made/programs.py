"""Tasks to repair a program: the reference solution of another generator with a small bug."""

from __future__ import annotations

import dataclasses
import random
from types import ModuleType

from envs.tasks.made import databases, logs, tables, text_tools, version_control
from envs.tasks.made.draft import Draft
from envs.tasks.made.mutate_text import mutants_of

SOURCES: tuple[ModuleType, ...] = (tables, logs, databases, text_tools, version_control)
# Seeds of the programs, away from those of the tasks that ask for them to be written.
FIRST_SEED = 1_000_000


def make(seed: int) -> Draft:
    """Return the task of a seed. Whether its bug matters is for the proof to find out."""
    rng = random.Random(f"programs/{seed}")
    source = SOURCES[seed % len(SOURCES)]
    whole = source.make(FIRST_SEED + seed)
    edits = mutants_of(whole.oracle, whole.language)
    by_kind: dict[str, list] = {}
    for edit in edits:
        by_kind.setdefault(edit.operator, []).append(edit)
    edit = rng.choice(by_kind[rng.choice(sorted(by_kind))])
    broken = edit.apply(whole.oracle)
    return dataclasses.replace(
        whole,
        name=f"software/{whole.name.replace('/', '-')}-{seed}",
        domain="software",
        family=f"repair-{whole.language}",
        instruction=(
            f"/app/{whole.program} is there already, and a bug is in it. Find and mend it; the"
            " program was written for this task:\n\n" + whole.instruction
        ),
        files={**whole.files, whole.program: broken},
        origin={"seed": seed, "bug": edit.operator},
    )
