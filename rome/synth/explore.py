"""Explore: finds the seeds of tasks. A seed names what a task may be made from; nothing runs here.

Packages, repositories and folders of others may be torn or hostile. What cannot be used is set
aside with its file and the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from envs.tasks.git import RepositoryError, git, is_repository
from envs.tasks.harbor.errors import TaskError
from envs.tasks.made import FAMILIES
from envs.tasks.made.packages import read_package
from envs.tasks.made.pro import INDEX, read_index
from envs.tasks.made.tools import is_tool_name
from rome.data.seeds import derive_seed

MAX_COMMITS = 400  # of a repository that are looked at
_LFS = "version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class Seed:
    """What tasks may be made from.

    Attributes:
      kind: "generated", "package", "commit", "tool" or "idea".
      name: a family, a folder, a repository, or a command.
      value: the seed of a family, or a commit.
      count: of the tasks that may be made from it.
    """

    kind: str
    name: str
    value: str
    count: int = 1

    @property
    def id(self) -> str:
        """What identifies the seed within a run."""
        return f"{self.kind}:{self.name}:{self.value}"


@dataclasses.dataclass(frozen=True)
class SetAside:
    """An input that cannot be used: its file, the record in it (0 for all of it), the reason."""

    file: str
    record: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


def parse_families(spec: str) -> dict[str, int]:
    """Return the number of seeds of each family that "NAMES:N" asks for; NAMES may be "all".

    Raises:
      ValueError: a family is unknown, or N is no number above 0.
    """
    names, _, number = spec.partition(":")
    chosen = list(FAMILIES) if names in ("all", "") else names.split(",")
    unknown = sorted(set(chosen) - set(FAMILIES))
    if unknown:
        known = ", ".join(FAMILIES)
        raise ValueError(f"family {unknown[0]!r} of --families={spec} is none of {known}")
    if number and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"--families={spec}: {number!r} is no number above 0, as in logs,git:20")
    return dict.fromkeys(chosen, int(number or 1))


def explore(
    families: str,
    packages: Sequence[str],
    repositories: Sequence[str],
    count: int,
    seed: int,
    tools: Sequence[str] = (),
) -> tuple[list[Seed], list[SetAside]]:
    """Return the seeds of a run, and the inputs that were set aside.

    Args:
      families: of generated tasks, as `parse_families` reads it; "" for none.
      packages: folders of Python packages.
      repositories: folders of git repositories.
      count: of the tasks of each package, each repository and each command.
      seed: of the run.
      tools: commands whose help is read.
    """
    seeds: list[Seed] = []
    aside: list[SetAside] = []
    for family, number in parse_families(families).items() if families else ():
        chosen = itertools.islice(_family_seeds(family, seed), number)
        seeds += [Seed("generated", family, str(value)) for value in chosen]
    for folder in packages:
        fault = _package_fault(pathlib.Path(folder))
        if fault:
            aside.append(fault)
        else:
            seeds.append(Seed("package", folder, "", count))
    for folder in repositories:
        found = _commits(pathlib.Path(folder))
        if isinstance(found, SetAside):
            aside.append(found)
        else:
            seeds.extend(Seed("commit", folder, commit) for commit in found)
    for tool in tools:
        if is_tool_name(tool):
            seeds.append(Seed("tool", tool, "", count))
        else:
            aside.append(SetAside(tool, 0, "no name of a command, such as sort"))
    return seeds, aside


def _family_seeds(family: str, seed: int) -> Iterator[int]:
    """Yield the seeds of a family in a run, without those that make a task of the set `pro`.

    That set is there to evaluate on, and what a run makes is there to train on.
    """
    evaluated = {entry["seed"] for entry in read_index(INDEX) if entry["family"] == family}
    for index in itertools.count():
        value = derive_seed(seed, family, index)
        if value not in evaluated:
            yield value


def _package_fault(folder: pathlib.Path) -> SetAside | None:
    try:
        files = read_package(folder)
    except (TaskError, OSError) as error:
        return SetAside(str(folder), 0, str(error))
    for name, text in files.items():
        if text.startswith(_LFS):
            return SetAside(
                str(folder.parent / name), 0, "a pointer of Git LFS, not the file itself"
            )
    return None


def _commits(folder: pathlib.Path) -> list[str] | SetAside:
    """Return the newest commits with one parent; git runs without the repository's settings."""
    if not is_repository(folder):
        return SetAside(str(folder), 0, "no git repository is here")
    try:
        listed = git(
            folder,
            "rev-list",
            "--no-merges",
            "--min-parents=1",
            f"--max-count={MAX_COMMITS}",
            "HEAD",
        )
    except (RepositoryError, OSError) as error:
        return SetAside(str(folder), 0, str(error))
    return listed.decode().split()
