"""Instance Builder: makes drafts of tasks from a seed. Code of packages runs in sandboxes only."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from envs.rock import SandboxError
from envs.tasks.made import FAMILIES, Case, Draft
from envs.tasks.made.commits import commit_draft
from envs.tasks.made.packages import package_drafts, record_package
from envs.tasks.made.tools import tool_drafts
from rome.synth.explore import Seed

LICENCE_BYTES = 64 << 10
# The words that licences of these kinds hold; sources under others are not used.
PERMISSIVE = {
    "MIT": "Permission is hereby granted, free of charge",
    "Apache-2.0": "Apache License",
    "BSD": "Redistribution and use in source and binary forms",
    "ISC": "Permission to use, copy, modify, and/or distribute",
}
# What parsing a hostile source, or a record that a hostile package wrote, can raise.
UNUSABLE = (ValueError, LookupError, TypeError, SyntaxError, RecursionError, MemoryError, OSError)


@dataclasses.dataclass(frozen=True)
class Built:
    """What became of a seed: its drafts, or the reason why there are none.

    Attributes:
      drafts: of the seed.
      reason: why there are none.
      tokens: that a model was billed for.
      is_fault: whether the machine was at fault, so that a resumed run tries again.
    """

    drafts: list[Draft]
    reason: str = ""
    tokens: int = 0
    is_fault: bool = False


async def build(seed: Seed, run_seed: int, isolation: str, licences: bool = True) -> Built:
    """Return the drafts of a seed.

    Args:
      seed: from Explore.
      run_seed: of the run.
      isolation: of the sandboxes.
      licences: whether a package or a repository must hold a permissive licence.
    """
    if seed.kind == "generated":
        return Built([FAMILIES[seed.name].make(int(seed.value))])
    licence = "not checked"
    if licences and seed.kind != "tool":
        licence = find_licence(pathlib.Path(seed.name))
    if not licence:
        return Built([], f"no permissive licence ({', '.join(PERMISSIVE)}) lies in or beside it")
    try:
        if seed.kind == "tool":
            return Built(await tool_drafts(seed.name, seed.count, run_seed, isolation))
        if seed.kind == "package":
            folder = pathlib.Path(seed.name)
            recording = await record_package(folder, run_seed, isolation)
            return Built(await package_drafts(recording, seed.count, run_seed, isolation, licence))
        found = await commit_draft(pathlib.Path(seed.name), seed.value, isolation, licence)
    except SandboxError as error:
        return Built([], str(error), is_fault=True)
    except UNUSABLE as error:  # one hostile input must not end the run of the others
        shown = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Built([], shown[:500])
    return Built([found]) if isinstance(found, Draft) else Built([], found)


def find_licence(folder: pathlib.Path) -> str:
    """Return the kind of licence of a package or a repository, or "".

    It is looked for in the folder, above it where that is a repository, and where pip puts it.
    """
    name = folder.resolve().name
    places = [folder, *folder.resolve().parent.glob(f"{name.replace('-', '_')}-*.dist-info")]
    if (folder.parent / ".git").exists():
        places.append(folder.parent)
    for place in places:
        for path in sorted(
            [*place.glob("LICEN*"), *place.glob("licenses/LICEN*"), *place.glob("COPYING*")]
        ):
            if not path.is_file():
                continue
            with open(path, errors="replace") as file:
                kind = kind_of_licence(file.read(LICENCE_BYTES))
            if kind:
                return kind
    return ""


def kind_of_licence(text: str) -> str:
    """Return the kind of permissive licence that a text is, or ""."""
    joined = " ".join(text.split())
    return next((kind for kind, words in PERMISSIVE.items() if words in joined), "")


# -- drafts on disk
# -------------------------------------------------------------------------------------------------


def draft_to_json(draft: Draft) -> dict[str, Any]:
    """Return a draft as JSON values; `draft_from_json` is the way back."""
    return dataclasses.asdict(draft)


def draft_from_json(value: dict[str, Any]) -> Draft:
    """Return the draft of JSON values."""
    cases = [Case(**{**case, "argv": tuple(case["argv"])}) for case in value["cases"]]
    lines = tuple(value["lines"])
    return Draft(**{**value, "cases": cases, "lines": lines})


def read_drafts(path: pathlib.Path) -> Built | None:
    """Return what `drafts_text` gave; None where the file is missing or torn."""
    try:
        document = json.loads(path.read_text())
        return Built([draft_from_json(one) for one in document["drafts"]], document["reason"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def drafts_text(built: Built) -> str:
    """Return the text of a file of drafts."""
    return json.dumps(
        {"reason": built.reason, "drafts": [draft_to_json(draft) for draft in built.drafts]}
    )
