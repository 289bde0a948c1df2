"""Finite sets: task folders, registries, parquet files, published files, bugs in packages."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from envs.rock import SandboxConfig
from envs.sources.generated import MADE_PLAY_SECONDS, UNGROUPED, parse_count
from envs.sources.source import LISTED_APART
from envs.sources.task import (
    MARGIN_SECONDS,
    Content,
    Settings,
    SourceError,
    Task,
    parts_of_value,
)
from envs.tasks.datasets import SUFFIXES, load_files
from envs.tasks.harbor import EXAMPLES, HarborEnv, HarborTask, TaskError
from envs.tasks.harbor.solution import is_one_command, reference_seconds
from envs.tasks.made.pro import load_pro
from envs.tasks.repair import repair_tasks, shipped
from envs.tasks.terminal.shell import BASH_TOOL, SYSTEM
from envs.worlds import bfcl

HARBOR_TURNS = 40
HARBOR_COMMAND_SECONDS = 60.0


def load_folder(spec: str, settings: Settings, faults: list[TaskError] | None) -> list[Task]:
    """Return the tasks of a folder or a file, or of the examples that ship here (harbor)."""
    name = spec
    if spec == "harbor":
        name = str(EXAMPLES)
    elif spec.startswith("harbor/"):
        name = str(EXAMPLES / spec.removeprefix("harbor/"))
    loaded = load_files(name, faults, settings.fetch, settings.environ)
    return [_harbor_task(task, settings) for task in loaded]


def names_files(spec: str) -> bool:
    """Return whether a folder or a file of a known kind has this name (perhaps with :PART)."""
    if spec in ("", "harbor"):
        return bool(spec)
    if spec.startswith("harbor/"):
        spec = str(EXAMPLES / spec.removeprefix("harbor/"))
    path = pathlib.Path(spec)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        return True
    if path.suffix not in SUFFIXES:  # perhaps FILE:PART
        path = pathlib.Path(spec.rpartition(":")[0] or spec)
    return path.suffix in SUFFIXES and os.path.isfile(path)


def load_repair(
    spec: str, seed: int, settings: Settings, faults: list[TaskError] | None
) -> list[Task]:
    """Return the tasks of repair[:PACKAGES[:N]].

    N bugs (by default one for each package) in packages of this repository or in the folders named;
    all packages of this repository if none is named.
    """
    parts = spec.split(":")
    names = [name for name in parts[1].split(",") if name] if len(parts) > 1 else []
    count = None
    if len(parts) > 2:
        count = parse_count(parts[2], LISTED_APART)
    if len(parts) > 3 or (len(parts) == 3 and count is None):
        raise SourceError(
            f"dataset {spec!r} is not repair[:PACKAGES[:N]] with N from 1 to {LISTED_APART}, for"
            " example repair:csvlite:20 or repair::100; packages that ship here:"
            f" {', '.join(shipped())}"
        )
    return [_harbor_task(task, settings) for task in repair_tasks(names, count, seed, faults)]


def load_pro_set(settings: Settings) -> list[Task]:
    """Return the tasks of pro."""
    return [_harbor_task(task, settings) for task in load_pro()]


def load_bfcl(spec: str) -> list[Task]:
    """Return the tasks of bfcl:CATEGORY or bfcl:FILE."""
    return [_published_task(entry) for entry in bfcl.load_dataset(spec.partition(":")[2])]


def _harbor_task(task: HarborTask, settings: Settings) -> Task:
    task = task.with_more_time(settings.timeout_multiplier)
    max_turns = settings.max_turns or HARBOR_TURNS

    def new_env(config: SandboxConfig) -> HarborEnv:
        return HarborEnv(
            task,
            config,
            images=settings.images,
            build_egress=settings.build_egress,
            verifier_egress=settings.verifier_egress,
            max_turns=max_turns,
            command_timeout=settings.command_timeout or HARBOR_COMMAND_SECONDS,
        )

    def read() -> Content:
        texts = tuple(step.instruction for step in task.steps)
        return Content(texts, texts[0], _parts_of(task))

    start_seconds = task.environment.build_timeout + SandboxConfig().start_timeout
    return Task(
        name=task.name,
        family=task.family,
        domain=task.category or UNGROUPED,
        difficulty=task.difficulty or UNGROUPED,
        cluster=task.metadata["package"] if task.format == "repair" else task.name,
        start_seconds=start_seconds + MARGIN_SECONDS,
        # Twice: a doubtful grade is compared with that of the reference solution.
        play_seconds=2 * reference_seconds(task) + MARGIN_SECONDS,
        grading_seconds=reference_seconds(task),
        max_turns=max_turns * len(task.steps),
        has_demonstrator=is_one_command(task),
        new_env=new_env,
        read=read,
        tools=(BASH_TOOL,),
        system=SYSTEM,
        path=task.path,
    )


def _parts_of(task: HarborTask) -> Sequence[bytes]:
    """Return all fields but path and name: a folder and an archive of it are one task."""
    fields: dict[str, Any] = {
        field.name: getattr(task, field.name) for field in dataclasses.fields(task)
    }
    del fields["path"], fields["name"]
    return parts_of_value(fields)


def _published_task(entry: Any) -> Task:
    """Return the task of an entry of a published file."""
    env = entry.make_env()
    opening, _ = env.reset()
    content = Content(
        texts=tuple(env.scenario.user.requests),
        opening=opening,
        parts=[
            "\n".join(env.scenario.user.requests).encode(errors="surrogatepass"),
            env.definition().encode(errors="surrogatepass"),
        ],
    )
    return Task(
        name=env.task.name,
        family=env.family,
        domain="bfcl",
        difficulty=env.difficulty,
        cluster=env.task.name,
        start_seconds=SandboxConfig().start_timeout + MARGIN_SECONDS,
        play_seconds=MADE_PLAY_SECONDS + MARGIN_SECONDS,
        grading_seconds=0.0,
        max_turns=env.max_turns,
        has_demonstrator=True,
        new_env=lambda config: entry.make_env(),
        read=lambda: content,
        tools=tuple(env.tools),
        system=env.system,
    )
