"""What an evaluation plays: a dataset's name or folder becomes a list of tasks, each of which can
make its environment.

load_tasks("envs/tasks/harbor/examples")     a folder of Harbor or Terminal-Bench 1 tasks, or one such task
load_tasks("harbor")                         the examples that ship here; "harbor/word-report" is one of them
load_tasks("terminal:wide:1000")             1,000 generated instances, spread evenly over the families and then over seeds
load_tasks("worlds:shop:100")                of tool-use worlds; also problems, games, bfcl:FILE, tau2:FOLDER: see worlds.py
load_tasks("repair::100")                    100 packages with a bug each; "repair:csvlite,path/to/package:100" names the packages
load_tasks("registry.json:NAME@VERSION")     what envs.tasks.datasets reads: registries, parquet, SWE-bench instances
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from envs.gem import Env
from envs.rock import SandboxConfig
from envs.tasks.datasets import SUFFIXES, load_files
from envs.tasks.harbor import EXAMPLES, HarborEnv, HarborTask, TaskError
from envs.tasks.harbor.env import SOLVE_TIMEOUT_SECONDS
from envs.tasks.repair import repair_tasks, shipped
from envs.tasks.terminal import (
    FAMILIES,
    FAMILY_TABLE,
    HELD_OUT_FAMILIES,
    WIDE_FAMILIES,
    WIDE_LIMITS,
    Task,
    eval_seed,
    make_task,
)
from envs.tasks.terminal.env import SETUP_TIMEOUT_SECONDS, VERIFIER_TIMEOUT_SECONDS, TerminalEnv
from envs.tasks.terminal.task import Demonstration
from rome.evals.worlds import Made, is_made, load_made

GROUPS = {
    "train": FAMILIES,
    "held_out": HELD_OUT_FAMILIES,
    "wide": WIDE_FAMILIES,
    "all": FAMILIES + HELD_OUT_FAMILIES + WIDE_FAMILIES,
}
# instances of a family that one --seed may have before they would be those of the next
SEEDS_APART = 100_000
MARGIN_S = 60.0  # beyond what a task's own limits add up to: a busy machine
TERMINAL_PLAY_S = 16 * 5.0 + VERIFIER_TIMEOUT_SECONDS
# of a world, a problem or a game: a scripted dialogue takes milliseconds, submitted code seconds
MADE_PLAY_S = 60.0
UNGROUPED = "(none)"


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One task of a dataset.

    `domain` and `difficulty` are what reports group by; texts of Harbor tasks come from strangers.

    start_seconds, play_seconds: the most that starting the environment, and a scripted agent with
    its grading, may take. images, build_egress: see `load_tasks`.
    """

    name: str
    family: str
    domain: str
    difficulty: str
    instruction: str
    source: Task | HarborTask | Made
    start_seconds: float
    play_seconds: float
    images: Mapping[str, tuple[str, ...]] | None = None
    build_egress: tuple[str, ...] | None = None

    def make_env(self, config: SandboxConfig) -> Env:
        """A fresh environment, not yet started."""
        if isinstance(self.source, Made):
            return self.source.make_env(config)
        if isinstance(self.source, HarborTask):
            return HarborEnv(
                self.source, config, images=self.images, build_egress=self.build_egress
            )
        return TerminalEnv(
            self.source, config, **(WIDE_LIMITS if self.family in WIDE_FAMILIES else {})
        )

    def demonstrator(self) -> Demonstration:
        """Start the scripted solution of a terminal task."""
        return self.source.demonstrator()

    def digest(self) -> bytes:
        """Of all that makes the task what it is: a changed task is another task."""
        whole = hashlib.blake2b(self.name.encode(errors="surrogatepass"), digest_size=16)
        for part in _parts(self.source):
            whole.update(len(part).to_bytes(8, "big") + part)
        return whole.digest()


def load_tasks(
    dataset: str,
    seed: int = 0,
    faults: list[TaskError] | None = None,
    fetch: bool = False,
    images: Mapping[str, tuple[str, ...]] | None = None,
    build_egress: tuple[str, ...] | None = None,
) -> list[EvalTask]:
    """The tasks of a dataset.

    `seed` chooses the instances of what is generated, and nothing of a folder or a file.

    Args:
      faults: where a list, malformed tasks are put there instead of raised.
      fetch: whether git may fetch the repositories that a registry names.
      images: base images that cannot be had and for which this machine stands, with the programs
        that must be there (`envs.tasks.harbor.build`).
      build_egress: what the build of a task's environment reaches (`envs.tasks.harbor.HarborEnv`).
    Raises: TaskError (file, row and line) for a malformed task, ValueError for a dataset that is
    none.
    """
    if dataset == "terminal" or dataset.startswith("terminal:"):
        return terminal_tasks(dataset, seed)
    if is_made(dataset):
        return [_of_made(made) for made in load_made(dataset, seed)]
    if dataset == "repair" or dataset.startswith("repair:"):
        return [_of_harbor(task) for task in _repair(dataset, seed)]
    name = (
        str(EXAMPLES)
        if dataset == "harbor"
        else (
            str(EXAMPLES / dataset.removeprefix("harbor/"))
            if dataset.startswith("harbor/")
            else dataset
        )
    )
    file = pathlib.Path(
        name if pathlib.Path(name).suffix in SUFFIXES else name.rpartition(":")[0] or name
    )
    if not (pathlib.Path(name).is_dir() or (file.suffix in SUFFIXES and file.is_file())):
        raise ValueError(
            f"dataset {dataset!r} is neither a folder, nor a {', '.join(SUFFIXES)} file, nor known"
            " by name. Names: harbor, harbor/TASK, terminal[:FAMILIES[:N]] with FAMILIES one of"
            f" {', '.join(GROUPS)} or family names with commas between them, repair[:PACKAGES[:N]],"
            " worlds[:NAMES[:N]], problems[:NAMES[:N]], games[:NAMES[:N]], bfcl:FILE, tau2:FOLDER"
        )
    return [_of_harbor(task, images, build_egress) for task in load_files(name, faults, fetch)]


def _repair(dataset: str, seed: int) -> list[HarborTask]:
    """repair[:PACKAGES[:N]]: N bugs (default: one for each package) in packages that ship here or
    lie in the folders named; none named: all that ship.
    """
    parts = dataset.split(":")
    names = [name for name in (parts[1] if len(parts) > 1 else "").split(",") if name]
    count = parts[2] if len(parts) > 2 else None
    if len(parts) > 3 or (
        count is not None
        and not (count.isascii() and count.isdecimal() and 0 < int(count) <= SEEDS_APART)
    ):
        raise ValueError(
            f"dataset {dataset!r} is not repair[:PACKAGES[:N]] with N from 1 to {SEEDS_APART}, for"
            " example repair:csvlite:20 or repair::100; packages that ship here:"
            f" {', '.join(shipped())}"
        )
    return repair_tasks(names, None if count is None else int(count), seed)


def terminal_tasks(dataset: str, seed: int) -> list[EvalTask]:
    """terminal[:FAMILIES[:N]]: N instances (default: one of each family) with evaluation seeds,
    which training never uses.
    """
    parts = dataset.split(":")
    families = _families(parts[1]) if len(parts) > 1 else GROUPS["all"]
    count = parts[2] if len(parts) > 2 else str(len(families))
    if (
        len(parts) > 3
        or not count.isascii()
        or not count.isdecimal()
        or not 0 < int(count) <= SEEDS_APART * len(families)
    ):
        raise ValueError(
            f"dataset {dataset!r} is not terminal[:FAMILIES[:N]] with N from 1 to"
            f" {SEEDS_APART * len(families)}, for example terminal:wide:1000"
        )
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; instances are drawn from seeds of 0 and more")
    return [
        _of_terminal(
            make_task(
                families[number % len(families)],
                eval_seed(seed * SEEDS_APART + number // len(families)),
            )
        )
        for number in range(int(count))
    ]


def dataset_digest(tasks: Sequence[EvalTask]) -> str:
    """Of all tasks and their order."""
    return hashlib.blake2b(b"".join(task.digest() for task in tasks), digest_size=16).hexdigest()


def _families(text: str) -> tuple[str, ...]:
    if text in GROUPS:
        return GROUPS[text]
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in GROUPS["all"]]:
        raise ValueError(
            f"terminal family {unknown[0]!r} is unknown; known: {', '.join(GROUPS)},"
            f" {', '.join(GROUPS['all'])}"
        )
    return names


def _of_terminal(task: Task) -> EvalTask:
    info = FAMILY_TABLE[task.family]
    return EvalTask(
        task.name,
        task.family,
        info.domain,
        str(info.difficulty),
        task.instruction,
        task,
        start_seconds=SandboxConfig().start_timeout + 2 * SETUP_TIMEOUT_SECONDS + MARGIN_S,
        play_seconds=TERMINAL_PLAY_S + MARGIN_S,
    )


def _of_harbor(
    task: HarborTask,
    images: Mapping[str, tuple[str, ...]] | None = None,
    build_egress: tuple[str, ...] | None = None,
) -> EvalTask:
    steps = [
        (step.agent_timeout or SOLVE_TIMEOUT_SECONDS)
        + step.verifier_timeout
        + (step.verifier_environment.build_timeout if step.verifier_environment else 0.0)
        for step in task.steps
    ]
    return EvalTask(
        task.name,
        task.family,
        task.category or UNGROUPED,
        task.difficulty or UNGROUPED,
        "\n".join(step.instruction for step in task.steps),
        task,
        images=images,
        build_egress=build_egress,
        start_seconds=task.environment.build_timeout + SandboxConfig().start_timeout + MARGIN_S,
        play_seconds=sum(steps) + MARGIN_S,
    )


def _of_made(made: Made) -> EvalTask:
    return EvalTask(
        made.name,
        made.family,
        made.domain,
        made.difficulty,
        made.text,
        made,
        start_seconds=SandboxConfig().start_timeout + MARGIN_S,
        play_seconds=MADE_PLAY_S + MARGIN_S,
    )


def _parts(source: Task | HarborTask | Made) -> list[bytes]:
    """All that makes a task what it is."""
    if isinstance(source, Made):
        return source.parts()
    return _harbor_parts(source) if isinstance(source, HarborTask) else _terminal_parts(source)


def _terminal_parts(task: Task) -> list[bytes]:
    files = [
        part
        for path, (content, mode) in sorted(task.files.items())
        for part in (path.encode(), content, str(mode).encode())
    ]
    return [task.instruction.encode(), task.setup.encode(), task.verifier.encode(), *files]


def _harbor_parts(task: HarborTask) -> list[bytes]:
    """All of the record but where it lies: a folder and an archive of the same task are one task."""
    return _parts_of(
        {
            field.name: getattr(task, field.name)
            for field in dataclasses.fields(task)
            if field.name != "path"
        }
    )


def _parts_of(value: Any) -> list[bytes]:
    if identity := getattr(
        value, "identity", None
    ):  # files that are made only when they are needed
        return [identity.encode()]
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return [
            b"{",
            *(
                part
                for key in sorted(value, key=str)
                for part in (str(key).encode(errors="surrogatepass"), *_parts_of(value[key]))
            ),
            b"}",
        ]
    if isinstance(value, (list, tuple)):
        return [b"[", *(part for one in value for part in _parts_of(one)), b"]"]
    if isinstance(value, pathlib.Path):
        return []
    return [value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")]
