"""Reads task folders of Harbor (task.toml, schema 1.0 to 1.4), and data sets made of them.

    tasks = load_dataset("envs/tasks/harbor/examples")
    task = load_task("some/task")           # TaskError names file and line of a fault

A data set is a folder of task folders. Terminal-Bench 1's task.yaml is read by terminal_bench_1.py.
The format grows, so unknown keys are accepted and listed in the record, and [environment] may be
missing.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.fields import (
    MAX_DOCKERFILE_BYTES,
    Table,
    need_unix_lines,
    read_folder,
    read_text,
)
from envs.tasks.harbor.task import NETWORK_MODES, Environment, Files, HarborTask, Healthcheck, Step
from envs.tasks.harbor.terminal_bench_1 import load_terminal_bench_1, needed_compose
from envs.tasks.harbor.toml import line_in_toml, parse_toml

MAX_TASK_DEPTH = 6  # levels of folders between a data set and its tasks
_CANARY = re.compile(r"\A\s*(?:<!--[^>]*canary[^>]*-->|#[^\n]*canary[^\n]*)\n", re.IGNORECASE)


def load_task(path: str | pathlib.Path, environ: Mapping[str, str] | None = None) -> HarborTask:
    """Read the task in a folder; its settings file decides the format.

    Args:
      path: the folder.
      environ: the values of ${NAME} in the settings' env tables. The environment of this process is
        never used.

    Raises:
      TaskError: the task is malformed, or no settings file is there.
    """
    folder = pathlib.Path(path)
    if (folder / "task.toml").exists():
        return load_harbor(folder, environ or {})
    if (folder / "task.yaml").exists():
        return load_terminal_bench_1(folder)
    raise TaskError(
        folder, 0, "neither task.toml (Harbor) nor task.yaml (Terminal-Bench 1) is here"
    )


def load_dataset(
    path: str | pathlib.Path,
    skip_malformed: list[TaskError] | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[HarborTask]:
    """Read every task below a folder, sorted by name.

    Args:
      path: the folder.
      skip_malformed: a list to which faults are added instead of being raised.
      environ: see `load_task`.

    Raises:
      TaskError: a task is malformed, two tasks have one name, or there are no tasks.
    """
    root = pathlib.Path(path)
    tasks: dict[str, HarborTask] = {}
    for folder in _task_folders(root, MAX_TASK_DEPTH):
        try:
            task = load_task(folder, environ)
            if task.name in tasks:
                raise TaskError(
                    folder, 0, f"task {task.name!r} is also in {tasks[task.name].path}; rename one"
                )
            tasks[task.name] = task
        except TaskError as error:
            if skip_malformed is None:
                raise
            skip_malformed.append(error)
    if not tasks and not skip_malformed:
        raise TaskError(root, 0, "no task.toml and no task.yaml lies below this folder")
    return [tasks[name] for name in sorted(tasks)]


def _task_folders(folder: pathlib.Path, depth: int) -> list[pathlib.Path]:
    if (folder / "task.toml").exists() or (folder / "task.yaml").exists():
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    inner = sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
    )
    return [found for child in inner for found in _task_folders(child, depth - 1)]


def line_of(task: HarborTask, *path: str) -> int:
    """Return the line of a task's settings file where a key is set.

    Returns 0 where that is unknown because the file is in an archive or in another process.
    """
    if task.format != "harbor":
        return 0
    try:
        return line_in_toml(read_text(task.path / "task.toml"), path)
    except TaskError:
        return 0


# -- Harbor
# -------------------------------------------------------------------------------------------------


def load_harbor(folder: pathlib.Path, environ: Mapping[str, str]) -> HarborTask:
    """Read a folder with a task.toml; see `load_task`."""
    file = folder / "task.toml"
    text = read_text(file)
    table = Table(file, parse_toml(file, text), lambda path: line_in_toml(text, path), environ)
    version = table.values.get("schema_version", table.values.get("version", "1.0"))
    table.known |= {"schema_version", "version"}
    if not isinstance(version, str) or not re.fullmatch(r"1(\.\d+)*", version):
        raise table.fault(
            "schema_version" if "schema_version" in table.values else "version",
            f"{version!r} is not a known schema version (1.0 to 1.4)",
        )
    metadata = table.get("metadata", dict, {})
    about = table.table("task")
    about.known |= {"description", "authors", "keywords"}
    step_tables = table.tables("steps")
    strategy = table.text("multi_step_reward_strategy") or "mean"
    if strategy not in ("mean", "final"):
        raise table.fault(
            "multi_step_reward_strategy", f'{strategy!r} is neither "mean" nor "final"'
        )
    defaults = _Phases().overridden(table)
    environment = _environment(folder / "environment", table.table("environment"))
    name = about.text("name") or folder.resolve().name
    steps = _steps(folder, table, step_tables, defaults, environment)
    tags = metadata.get("tags", ())
    artifacts = tuple(table.get("artifacts", list, []))
    table.known.add("source")
    return HarborTask(
        name=name,
        path=folder,
        format="harbor",
        schema_version=version,
        environment=environment,
        steps=tuple(steps),
        reward_strategy=strategy,
        difficulty=_word(metadata, "difficulty"),
        category=_word(metadata, "category"),
        tags=tuple(map(str, tags)) if isinstance(tags, list) else (),
        metadata=metadata,
        artifacts=artifacts,
        unknown_keys=tuple(table.unknown()),
    )


def _word(metadata: dict, key: str) -> str:
    value = metadata.get(key, "")
    return value if isinstance(value, str) else str(value)


@dataclasses.dataclass(frozen=True)
class _Phases:
    """The settings of agent, verifier and solution, which steps inherit from the task."""

    networks: Mapping[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    agent_timeout: float | None = None
    verifier_timeout: float | None = 600.0
    verifier_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    solution_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    collect: tuple[str, ...] = ()
    separate: bool = False
    verifier_environment: Table | None = None

    def overridden(self, table: Table) -> _Phases:
        """Return these settings with those of a task's or a step's table in their place."""
        agent = table.table("agent")
        verifier = table.table("verifier")
        solution = table.table("solution")
        networks = {**self.networks, **_networks(agent), **_networks(verifier)}
        agent_timeout = agent.seconds("timeout_sec", self.agent_timeout)
        verifier_timeout = verifier.seconds("timeout_sec", self.verifier_timeout)
        verifier_env = {**self.verifier_env, **verifier.environment("env")}
        solution_env = {**self.solution_env, **solution.environment("env")}
        collect = tuple(_collect_command(hook) for hook in verifier.tables("collect"))
        own = verifier.table("environment") if "environment" in verifier.values else None
        return _Phases(
            networks=networks,
            agent_timeout=agent_timeout,
            verifier_timeout=verifier_timeout,
            verifier_env=verifier_env,
            solution_env=solution_env,
            collect=collect or self.collect,
            separate=_is_separate(verifier, own, self.separate),
            verifier_environment=own or self.verifier_environment,
        )


def _networks(phase: Table) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return a phase's own network policy, if it has one."""
    # "user" stays unknown: commands run as the one user of a sandbox, and unknown_keys says so.
    phase.known |= {"network_mode", "allowed_hosts"}
    mode = phase.text("network_mode")
    _check_network(phase, mode)
    if mode is None:
        return {}
    return {phase.path[-1]: (mode, phase.texts("allowed_hosts"))}


def _is_separate(verifier: Table, own: Table | None, inherited: bool) -> bool:
    """Return whether the tests run in an environment of their own."""
    default = "separate" if own or inherited else "shared"
    mode = verifier.text("environment_mode", default)
    if mode not in ("shared", "separate"):
        raise verifier.fault("environment_mode", f'{mode!r} is neither "shared" nor "separate"')
    if own and mode == "shared":
        raise verifier.fault(
            "environment_mode", '"shared" beside a verifier.environment; leave one of them out'
        )
    return mode == "separate"


def _steps(
    folder: pathlib.Path,
    table: Table,
    step_tables: list[Table],
    defaults: _Phases,
    environment: Environment,
) -> list[Step]:
    tests = read_folder(folder / "tests")
    solution = read_folder(folder / "solution")
    artifacts = _artifacts(table)
    if not step_tables:
        instruction = _instruction(folder / "instruction.md")
        _need_test(folder / "tests" / "test.sh", tests)
        verifier_environment = _verifier_environment(defaults, (folder / "tests",), environment)
        step = Step(
            "task",
            instruction,
            tests,
            solution=solution,
            solve_script=_solve(folder / "solution", solution),
            artifacts=artifacts,
            verifier_environment=verifier_environment,
            **_of_phases(defaults),
        )
        return [step]
    found: list[Step] = []
    for step in step_tables:
        name = step.text("name")
        if not name or not re.fullmatch(r"[\w][\w.-]*", name):
            raise step.fault(
                "name" if name else None,
                f"step {len(found) + 1} needs a name of letters, digits, '.', '_' and '-', and has"
                f" {name!r}",
            )
        if any(other.name == name for other in found):
            raise step.fault("name", f"two steps are named {name!r}")
        found.append(_step(folder, name, step, defaults, environment, tests, artifacts))
    return found


def _step(
    folder: pathlib.Path,
    name: str,
    table: Table,
    defaults: _Phases,
    environment: Environment,
    shared_tests: Files,
    shared_artifacts: tuple[str, ...],
) -> Step:
    """Read one of several steps; its tests and artifacts come on top of those of the task."""
    place = folder / "steps" / name
    tests = {**shared_tests, **read_folder(place / "tests")}
    solution = read_folder(place / "solution")
    _need_test(place / "tests" / "test.sh", tests)
    phases = defaults.overridden(table)
    test_folders = (place / "tests", folder / "tests")
    return Step(
        name,
        _instruction(place / "instruction.md"),
        tests,
        solution=solution,
        solve_script=_solve(place / "solution", solution),
        setup=_setup(place / "workdir"),
        min_reward=_min_reward(table),
        healthcheck=_healthcheck(table),
        artifacts=(*shared_artifacts, *_artifacts(table)),
        verifier_environment=_verifier_environment(phases, test_folders, environment),
        **_of_phases(phases),
    )


def _of_phases(phases: _Phases) -> dict[str, Any]:
    return {
        "agent_timeout": phases.agent_timeout,
        "verifier_timeout": phases.verifier_timeout,
        "verifier_env": phases.verifier_env,
        "solution_env": phases.solution_env,
        "networks": phases.networks,
        "collect": phases.collect,
    }


def _collect_command(hook: Table) -> str:
    command = hook.text("command")
    service = hook.text("service", "main")
    if not command or service != "main":
        raise hook.fault(
            "command" if not command else "service",
            'a hook of verifier.collect needs a command and runs in the service "main", not in'
            f" {service!r}",
        )
    return command


def _verifier_environment(
    phases: _Phases, places: tuple[pathlib.Path, ...], agents: Environment
) -> Environment | None:
    """Return the environment in which the tests run, or None if it is the agent's.

    It is built from the Dockerfile in the first of the folders that has one, with the verifier's
    own settings or else the agent's.
    """
    if not phases.separate:
        return None
    place = next((one for one in places if (one / "Dockerfile").exists()), places[-1])
    if phases.verifier_environment:
        found = _environment(place, phases.verifier_environment)
    else:
        found = dataclasses.replace(
            agents, **_definition(place), docker_image=None, healthcheck=None, mcp_servers=()
        )
    if found.dockerfile is None and found.docker_image is None:
        raise TaskError(
            place / "Dockerfile",
            0,
            "missing; a separate verifier is built from it, or has a docker_image in"
            " verifier.environment",
        )
    return found


def _artifacts(table: Table) -> tuple[str, ...]:
    """Return the paths of the artifacts in the agent's and a separate verifier's environment.

    An entry's `destination` names a place in Harbor's reports and does not matter here.
    """
    found = []
    for entry in table.get("artifacts", list, []):
        source = entry.get("source") if isinstance(entry, dict) else entry
        if not isinstance(source, str) or not source.startswith("/") or "\0" in source:
            raise table.fault("artifacts", f"{str(entry)[:60]!r} does not name an absolute path")
        found.append(source)
    return tuple(found)


def _instruction(path: pathlib.Path) -> str:
    text = read_text(path)
    while match := _CANARY.match(text):
        text = text[match.end() :]
    if not text.strip():
        raise TaskError(path, 1, "the instruction is empty")
    return text.strip() + "\n"


def _need_test(path: pathlib.Path, tests: Files) -> None:
    if "test.sh" not in tests:
        raise TaskError(path, 0, "missing; it grades the task")
    need_unix_lines(path, tests["test.sh"][0])


def _solve(folder: pathlib.Path, solution: Files) -> str | None:
    if "solve.sh" not in solution:
        return None
    need_unix_lines(folder / "solve.sh", solution["solve.sh"][0])
    return "solve.sh"


def _setup(folder: pathlib.Path) -> Files:
    files = read_folder(folder)
    if "setup.sh" in files:
        need_unix_lines(folder / "setup.sh", files["setup.sh"][0])
    return files


def _min_reward(step: Table) -> float | dict[str, float] | None:
    if isinstance(step.values.get("min_reward"), dict):
        limits = step.table("min_reward")
        return {key: limits.number(key, 0.0) for key in limits.values}
    return step.number("min_reward", None)


def _healthcheck(table: Table) -> Healthcheck | None:
    check = table.table("healthcheck")
    if not check.values:
        return None
    command = check.text("command")
    if not command:
        raise check.fault("command", "a health check needs a command")
    return Healthcheck(
        command,
        check.seconds("interval_sec", 5.0),
        check.seconds("timeout_sec", 30.0),
        check.number("start_period_sec", 0.0),
        check.integer("retries", 3),
    )


def _check_network(table: Table, mode: object) -> None:
    if mode is not None and mode not in NETWORK_MODES:
        raise table.fault("network_mode", f"{mode!r} is not one of {', '.join(NETWORK_MODES)}")


def _definition(place: pathlib.Path) -> dict[str, Any]:
    """Return the settings of an environment that follow from the folder it is built from."""
    context = read_folder(place, as_context=True)
    dockerfile = None
    if "Dockerfile" in context:
        dockerfile = read_text(place / "Dockerfile", MAX_DOCKERFILE_BYTES)
    return {
        "context": context,
        "dockerfile": dockerfile,
        "dockerfile_path": place / "Dockerfile",
        "compose_path": needed_compose(place),
    }


def _environment(place: pathlib.Path, table: Table) -> Environment:
    allowed = table.get("allow_internet", bool, True)
    mode = table.text("network_mode") or ("public" if allowed else "no-network")
    _check_network(table, mode)
    cpus = table.number("cpus", None, above=0.0)
    for key in ("os", "gpu_types", "tpu", "skills_dir", "start_period_env_sec"):
        table.known.add(key)
    workdir = table.text("workdir")
    if workdir is not None and not workdir.startswith("/"):
        raise table.fault("workdir", f"{workdir!r} is not an absolute path")
    return Environment(
        **_definition(place),
        docker_image=table.text("docker_image"),
        build_timeout=table.seconds("build_timeout_sec", 600.0),
        cpus=cpus,
        memory_mb=table.megabytes("memory_mb", "memory"),
        storage_mb=table.megabytes("storage_mb", "storage"),
        gpus=table.integer("gpus", 0),
        network_mode=mode,
        allowed_hosts=table.texts("allowed_hosts"),
        workdir=workdir,
        env=table.environment("env"),
        healthcheck=_healthcheck(table),
        mcp_servers=tuple(_entries(table, "mcp_servers")),
    )


def _entries(table: Table, key: str) -> list:
    """Return tables that are passed on unread."""
    found = table.tables(key)
    for entry in found:
        entry.known |= set(entry.values)
    return [entry.values for entry in found]
