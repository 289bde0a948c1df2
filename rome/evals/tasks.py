"""Datasets: the name of a dataset, or a folder, becomes a list of tasks.

load_tasks("envs/tasks/harbor/examples")  a folder of Harbor or Terminal-Bench 1 tasks, or one task
load_tasks("harbor")                      the examples of this repository; also "harbor/word-report"
load_tasks("terminal:wide:1000")          1,000 generated instances, spread evenly over the families
load_tasks("worlds:shop:100")             tool-use worlds; also problems, games and bfcl:FILE,
                                          see worlds.py
load_tasks("repair::100")                 100 packages with a bug each; "repair:csvlite,DIR:100"
                                          names the packages
load_tasks("registry.json:NAME@VERSION")  everything that envs.tasks.datasets reads: registries,
                                          parquet files, SWE-bench instances
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
from envs.tasks.harbor.env import reference_seconds
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
from rome.agent.environment import success_reward
from rome.evals.worlds import SEEDS_APART, Made, is_made, load_made, parse_count

GROUPS = {
    "train": FAMILIES,
    "held_out": HELD_OUT_FAMILIES,
    "wide": WIDE_FAMILIES,
    "all": FAMILIES + HELD_OUT_FAMILIES + WIDE_FAMILIES,
}
MARGIN_SECONDS = 60.0  # added to the task's own limits, for a busy machine
TERMINAL_PLAY_SECONDS = 16 * 5.0 + VERIFIER_TIMEOUT_SECONDS
# Of a world, a problem or a game: a scripted dialogue takes milliseconds, submitted code seconds.
MADE_PLAY_SECONDS = 60.0
UNGROUPED = "(none)"


@dataclasses.dataclass(frozen=True)
class HarborSettings:
    """How task folders are played, beside the config of their sandboxes.

    Attributes:
      images: base images that cannot be had, for which this machine's system stands, with the
        programs that it must have (`envs.tasks.harbor.build`).
      build_egress: hosts that the build of a task's environment may reach (HarborEnv).
      verifier_egress: hosts that the tests may reach (HarborEnv).
      max_turns: turns of each step.
      command_timeout: seconds for one command.
      timeout_multiplier: of all time limits that a task has.
    """

    images: Mapping[str, tuple[str, ...]] | None = None
    build_egress: tuple[str, ...] | None = None
    verifier_egress: tuple[str, ...] = ()
    max_turns: int = 40
    command_timeout: float = 60.0
    timeout_multiplier: float = 1.0

    def make_env(self, task: HarborTask, config: SandboxConfig) -> HarborEnv:
        """Return a task's environment, not started yet; the task has its time limits already."""
        return HarborEnv(
            task,
            config,
            images=self.images,
            build_egress=self.build_egress,
            verifier_egress=self.verifier_egress,
            max_turns=self.max_turns,
            command_timeout=self.command_timeout,
        )


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One task of a dataset.

    Attributes:
      name: unique within the dataset.
      family: of generated tasks, or the folder of others.
      domain: reports group by it.
      difficulty: reports group by it.
      cluster: tasks of one cluster resemble each other: seeds of a family, bugs of a package. Other
        tasks are each their own.
      instruction: for the agent. The text of a task folder may be hostile.
      source: makes the environment.
      start_seconds: limit for starting the environment.
      play_seconds: limit for a scripted agent with its grading.
      harbor: how task folders are played.
    """

    name: str
    family: str
    domain: str
    difficulty: str
    cluster: str
    instruction: str
    source: Task | HarborTask | Made
    start_seconds: float
    play_seconds: float
    harbor: HarborSettings = HarborSettings()

    def make_env(self, config: SandboxConfig) -> Env:
        """Return a new environment that is not started yet."""
        if isinstance(self.source, Made):
            return self.source.make_env(config)
        if isinstance(self.source, HarborTask):
            return self.harbor.make_env(self.source, config)
        limits = WIDE_LIMITS if self.family in WIDE_FAMILIES else {}
        return TerminalEnv(self.source, config, **limits)

    @property
    def success(self) -> float:
        """Return the reward from which on the task counts as solved."""
        return success_reward(self.source)

    def demonstrator(self) -> Demonstration:
        """Start the scripted solution of a terminal task."""
        return self.source.demonstrator()

    def digest(self) -> bytes:
        """Return a hash over everything that defines the task."""
        whole = hashlib.blake2b(self.name.encode(errors="surrogatepass"), digest_size=16)
        for part in _parts_of_source(self.source):
            whole.update(len(part).to_bytes(8, "big") + part)
        return whole.digest()


# -- datasets
# -------------------------------------------------------------------------------------------------


def load_tasks(
    dataset: str,
    seed: int = 0,
    faults: list[TaskError] | None = None,
    fetch: bool = False,
    harbor: HarborSettings | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[EvalTask]:
    """Return the tasks of a dataset.

    Args:
      dataset: its name, or a folder or file.
      seed: chooses the instances of generated datasets; folders and files do not depend on it.
      faults: where given, malformed tasks are appended to it instead of raised.
      fetch: whether git may fetch the repositories that a registry names.
      harbor: how task folders are played.
      environ: the values of ${NAME} in the env tables of task folders
        (`envs.tasks.harbor.load_task`).

    Raises:
      TaskError: a task is malformed; the message has file, row and line.
      ValueError: there is no such dataset.
    """
    kind = dataset.partition(":")[0]
    if kind == "terminal":
        return terminal_tasks(dataset, seed)
    if is_made(dataset):
        return [_of_made(made) for made in load_made(dataset, seed)]
    if kind == "repair":
        return [_of_harbor(task) for task in _load_repair(dataset, seed, faults)]
    name = dataset
    if dataset == "harbor":
        name = str(EXAMPLES)
    elif dataset.startswith("harbor/"):
        name = str(EXAMPLES / dataset.removeprefix("harbor/"))
    if not _names_files(name):
        raise ValueError(
            f"dataset {dataset!r} is neither a folder, nor a {', '.join(SUFFIXES)} file, nor known"
            " by name. Names: harbor, harbor/TASK, terminal[:FAMILIES[:N]] with FAMILIES one of"
            f" {', '.join(GROUPS)} or family names with commas between them, repair[:PACKAGES[:N]],"
            " worlds[:NAMES[:N]], problems[:NAMES[:N]], games[:NAMES[:N]], bfcl:FILE"
        )
    settings = harbor or HarborSettings()
    return [_of_harbor(task, settings) for task in load_files(name, faults, fetch, environ)]


def _names_files(name: str) -> bool:
    """Return whether a folder or a file of a known kind has this name (perhaps with :PART)."""
    path = pathlib.Path(name)
    if path.is_dir():
        return True
    if path.suffix not in SUFFIXES:  # perhaps FILE:PART
        path = pathlib.Path(name.rpartition(":")[0] or name)
    return path.suffix in SUFFIXES and path.is_file()


def terminal_tasks(dataset: str, seed: int) -> list[EvalTask]:
    """Return the tasks of terminal[:FAMILIES[:N]].

    They have evaluation seeds, which training never uses.

    Args:
      dataset: N is the number of instances; by default one of each family.
      seed: chooses the instances.
    """
    parts = dataset.split(":")
    families = _parse_families(parts[1]) if len(parts) > 1 else GROUPS["all"]
    most = SEEDS_APART * len(families)
    count: int | None = len(families)
    if len(parts) > 2:
        count = parse_count(parts[2], most)
    if count is None or len(parts) > 3:
        raise ValueError(
            f"dataset {dataset!r} is not terminal[:FAMILIES[:N]] with N from 1 to"
            f" {most}, for example terminal:wide:1000"
        )
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; instances are drawn from seeds of 0 and more")
    tasks = []
    for number in range(count):
        round_number, index = divmod(number, len(families))
        task_seed = eval_seed(seed * SEEDS_APART + round_number)
        tasks.append(_of_terminal(make_task(families[index], task_seed)))
    return tasks


def _load_repair(dataset: str, seed: int, faults: list[TaskError] | None) -> list[HarborTask]:
    """Return the tasks of repair[:PACKAGES[:N]].

    N bugs (by default one for each package) in packages of this repository or in the folders named;
    all packages of this repository if none is named.
    """
    parts = dataset.split(":")
    names = [name for name in parts[1].split(",") if name] if len(parts) > 1 else []
    count = None
    if len(parts) > 2:
        count = parse_count(parts[2], SEEDS_APART)
    if len(parts) > 3 or (len(parts) == 3 and count is None):
        raise ValueError(
            f"dataset {dataset!r} is not repair[:PACKAGES[:N]] with N from 1 to {SEEDS_APART}, for"
            " example repair:csvlite:20 or repair::100; packages that ship here:"
            f" {', '.join(shipped())}"
        )
    return repair_tasks(names, count, seed, faults)


def dataset_digest(tasks: Sequence[EvalTask]) -> str:
    """Return a hash over all tasks and their order."""
    return hashlib.blake2b(b"".join(task.digest() for task in tasks), digest_size=16).hexdigest()


def _parse_families(text: str) -> tuple[str, ...]:
    """Return the families of a group's name, or of names with commas between them."""
    if text in GROUPS:
        return GROUPS[text]
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in GROUPS["all"]]
    if unknown:
        raise ValueError(
            f"terminal family {unknown[0]!r} is unknown; known: {', '.join(GROUPS)},"
            f" {', '.join(GROUPS['all'])}"
        )
    return names


# -- tasks
# -------------------------------------------------------------------------------------------------


def _of_terminal(task: Task) -> EvalTask:
    family = FAMILY_TABLE[task.family]
    start_seconds = SandboxConfig().start_timeout + 2 * SETUP_TIMEOUT_SECONDS
    return EvalTask(
        name=task.name,
        family=task.family,
        domain=family.domain,
        difficulty=str(family.difficulty),
        cluster=task.family,
        instruction=task.instruction,
        source=task,
        start_seconds=start_seconds + MARGIN_SECONDS,
        play_seconds=TERMINAL_PLAY_SECONDS + MARGIN_SECONDS,
    )


def _of_harbor(task: HarborTask, settings: HarborSettings | None = None) -> EvalTask:
    settings = settings or HarborSettings()
    task = task.with_more_time(settings.timeout_multiplier)
    # Twice: a doubtful grade is compared with that of the reference solution.
    play_seconds = 2 * reference_seconds(task) + MARGIN_SECONDS
    start_seconds = task.environment.build_timeout + SandboxConfig().start_timeout
    return EvalTask(
        name=task.name,
        family=task.family,
        domain=task.category or UNGROUPED,
        difficulty=task.difficulty or UNGROUPED,
        cluster=task.metadata["package"] if task.format == "repair" else task.name,
        instruction="\n".join(step.instruction for step in task.steps),
        source=task,
        start_seconds=start_seconds + MARGIN_SECONDS,
        play_seconds=play_seconds,
        harbor=settings,
    )


def _of_made(made: Made) -> EvalTask:
    return EvalTask(
        name=made.name,
        family=made.family,
        domain=made.domain,
        difficulty=made.difficulty,
        cluster=made.cluster,
        instruction=made.text,
        source=made,
        start_seconds=SandboxConfig().start_timeout + MARGIN_SECONDS,
        play_seconds=MADE_PLAY_SECONDS + MARGIN_SECONDS,
    )


# -- digests
# -------------------------------------------------------------------------------------------------


def _parts_of_source(source: Task | HarborTask | Made) -> list[bytes]:
    """Return everything that defines a task."""
    if isinstance(source, Made):
        return source.parts()
    if isinstance(source, HarborTask):
        return _parts_of_harbor(source)
    return _parts_of_terminal(source)


def _parts_of_terminal(task: Task) -> list[bytes]:
    parts = [task.instruction.encode(), task.setup.encode(), task.verifier.encode()]
    for path, (content, mode) in sorted(task.files.items()):
        parts += [path.encode(), content, str(mode).encode()]
    return parts


def _parts_of_harbor(task: HarborTask) -> list[bytes]:
    """Return all fields but the path: a folder and an archive of the same task are one task."""
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    del fields["path"]
    return _parts_of_value(fields)


def _parts_of_value(value: Any) -> list[bytes]:
    """Return a value as bytes that differ for different values; paths have none."""
    identity = getattr(value, "identity", None)
    if identity:  # files that are made only when they are needed
        return [identity.encode()]
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        parts = [b"{"]
        for key in sorted(value, key=str):
            parts.append(str(key).encode(errors="surrogatepass"))
            parts += _parts_of_value(value[key])
        return [*parts, b"}"]
    if isinstance(value, list | tuple):
        parts = [b"["]
        for element in value:
            parts += _parts_of_value(element)
        return [*parts, b"]"]
    if isinstance(value, pathlib.Path):
        return []
    return [value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")]
