"""What an evaluation plays: a dataset's name or folder becomes a list of tasks, each of which can make its environment.

    load_tasks("envs/tasks/harbor/examples")     a folder of Harbor or Terminal-Bench 1 tasks, or one such task
    load_tasks("harbor")                         the examples that ship here; "harbor/word-report" is one of them
    load_tasks("terminal:wide:1000")             1,000 generated instances, spread evenly over the families and then over seeds
    load_tasks("worlds:shop:100")                of tool-use worlds; also problems, games, bfcl:FILE, tau2:FOLDER: see worlds.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

from envs.gem import Env
from envs.rock import SandboxConfig
from envs.tasks.harbor import EXAMPLES, HarborEnv, HarborTask, TaskError, load_dataset
from envs.tasks.harbor.env import SOLVE_TIMEOUT_S
from envs.tasks.terminal import FAMILIES, FAMILY_TABLE, HELD_OUT_FAMILIES, WIDE_FAMILIES, WIDE_LIMITS, Task, eval_seed, make_task
from envs.tasks.terminal.env import SETUP_TIMEOUT_S, VERIFIER_TIMEOUT_S, TerminalEnv
from envs.tasks.terminal.task import Expert
from rome.evals.worlds import Made, is_made, load_made

GROUPS = {"train": FAMILIES, "held_out": HELD_OUT_FAMILIES, "wide": WIDE_FAMILIES, "all": FAMILIES + HELD_OUT_FAMILIES + WIDE_FAMILIES}
SEEDS_APART = 100_000  # instances of a family that one --seed may have before they would be those of the next
MARGIN_S = 60.0  # beyond what a task's own limits add up to: a busy machine
TERMINAL_PLAY_S = 16 * 5.0 + VERIFIER_TIMEOUT_S
MADE_PLAY_S = 60.0  # of a world, a problem or a game: a scripted dialogue takes milliseconds, submitted code seconds
UNGROUPED = "(none)"


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One task of a dataset. `domain` and `difficulty` are what reports group by; texts of Harbor tasks come from strangers.

    start_seconds, play_seconds: the most that starting the environment, and a scripted agent with its grading, may take.
    """

    name: str
    family: str
    domain: str
    difficulty: str
    instruction: str
    source: Task | HarborTask | Made
    start_seconds: float
    play_seconds: float

    def make_env(self, config: SandboxConfig) -> Env:
        """A fresh environment, not yet started."""
        if isinstance(self.source, Made):
            return self.source.make_env(config)
        if isinstance(self.source, HarborTask):
            return HarborEnv(self.source, config)
        return TerminalEnv(self.source, config, **(WIDE_LIMITS if self.family in WIDE_FAMILIES else {}))

    def expert(self) -> Expert:
        """The scripted solution of a terminal task."""
        return self.source.expert()

    def digest(self) -> bytes:
        """Of all that makes the task what it is: a changed task is another task."""
        whole = hashlib.blake2b(self.name.encode(errors="surrogatepass"), digest_size=16)
        for part in _parts(self.source):
            whole.update(len(part).to_bytes(8, "big") + part)
        return whole.digest()


def load_tasks(dataset: str, seed: int = 0, faults: list[TaskError] | None = None) -> list[EvalTask]:
    """The tasks of a dataset. `seed` chooses the instances of generated families, and nothing of a folder.

    Args:
      faults: where a list, malformed task folders are put there instead of raised.
    Raises: TaskError (file and line) for a malformed task, ValueError for a dataset that is none.
    """
    if dataset == "terminal" or dataset.startswith("terminal:"):
        return terminal_tasks(dataset, seed)
    if is_made(dataset):
        return [_of_made(made) for made in load_made(dataset, seed)]
    folder = EXAMPLES if dataset == "harbor" else EXAMPLES / dataset.removeprefix("harbor/") if dataset.startswith("harbor/") else pathlib.Path(dataset)
    if not folder.is_dir():
        raise ValueError(f"dataset {dataset!r} is neither a folder nor known by name. Names: harbor, harbor/TASK, terminal[:FAMILIES[:N]] with FAMILIES one "
                         f"of {', '.join(GROUPS)} or family names with commas between them, worlds[:NAMES[:N]], problems[:NAMES[:N]], games[:NAMES[:N]], "
                         "bfcl:FILE, tau2:FOLDER")
    return [_of_harbor(task) for task in load_dataset(folder, faults)]


def terminal_tasks(dataset: str, seed: int) -> list[EvalTask]:
    """terminal[:FAMILIES[:N]]: N instances (default: one of each family) with evaluation seeds, which training never uses."""
    parts = dataset.split(":")
    families = _families(parts[1]) if len(parts) > 1 else GROUPS["all"]
    count = parts[2] if len(parts) > 2 else str(len(families))
    if len(parts) > 3 or not count.isascii() or not count.isdecimal() or not 0 < int(count) <= SEEDS_APART * len(families):
        raise ValueError(f"dataset {dataset!r} is not terminal[:FAMILIES[:N]] with N from 1 to {SEEDS_APART * len(families)}, for example terminal:wide:1000")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative; instances are drawn from seeds of 0 and more")
    return [_of_terminal(make_task(families[number % len(families)], eval_seed(seed * SEEDS_APART + number // len(families)))) for number in range(int(count))]


def dataset_digest(tasks: Sequence[EvalTask]) -> str:
    """Of all tasks and their order."""
    return hashlib.blake2b(b"".join(task.digest() for task in tasks), digest_size=16).hexdigest()


def _families(text: str) -> tuple[str, ...]:
    if text in GROUPS:
        return GROUPS[text]
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in GROUPS["all"]]:
        raise ValueError(f"terminal family {unknown[0]!r} is unknown; known: {', '.join(GROUPS)}, {', '.join(GROUPS['all'])}")
    return names


def _of_terminal(task: Task) -> EvalTask:
    info = FAMILY_TABLE[task.family]
    return EvalTask(task.name, task.family, info.domain, str(info.difficulty), task.instruction, task,
                    start_seconds=SandboxConfig().start_timeout + 2 * SETUP_TIMEOUT_S + MARGIN_S, play_seconds=TERMINAL_PLAY_S + MARGIN_S)


def _of_harbor(task: HarborTask) -> EvalTask:
    steps = [(step.agent_timeout or SOLVE_TIMEOUT_S) + step.verifier_timeout for step in task.steps]
    return EvalTask(task.name, task.category or task.format, task.category or UNGROUPED, task.difficulty or UNGROUPED,
                    "\n".join(step.instruction for step in task.steps), task,
                    start_seconds=task.environment.build_timeout + SandboxConfig().start_timeout + MARGIN_S, play_seconds=sum(steps) + MARGIN_S)


def _of_made(made: Made) -> EvalTask:
    return EvalTask(made.name, made.family, made.domain, made.difficulty, made.text, made, start_seconds=SandboxConfig().start_timeout + MARGIN_S,
                    play_seconds=MADE_PLAY_S + MARGIN_S)


def _parts(source: Task | HarborTask | Made) -> list[bytes]:
    """All that makes a task what it is."""
    if isinstance(source, Made):
        return source.parts()
    return _harbor_parts(source) if isinstance(source, HarborTask) else _terminal_parts(source)


def _terminal_parts(task: Task) -> list[bytes]:
    files = [part for path, (content, mode) in sorted(task.files.items()) for part in (path.encode(), content, str(mode).encode())]
    return [task.instruction.encode(), task.setup.encode(), task.verifier.encode(), *files]


def _harbor_parts(task: HarborTask) -> list[bytes]:
    """Every file of the folder, links as what they are (the loader follows none out of it)."""
    parts = []
    for path in sorted(task.path.rglob("*")):
        if path.is_file() and not path.is_symlink():
            parts += [str(path.relative_to(task.path)).encode(errors="surrogateescape"), path.read_bytes()]
    return parts
