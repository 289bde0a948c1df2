"""Reads task folders: Harbor's task.toml (schema 1.0 to 1.4, several steps), Terminal-Bench 1's
task.yaml, and datasets, which are folders of them.

    tasks = load_dataset("envs/tasks/harbor/examples")
    task = load_task("some/task")           # TaskError names file and line of what is wrong

Unknown keys are accepted and listed in the record, for the format grows. A missing [environment] is
accepted too.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.fields import MAX_DOCKERFILE_BYTES, Table, read_folder, read_text
from envs.tasks.harbor.task import NETWORK_MODES, Environment, Files, HarborTask, Healthcheck, Step
from envs.tasks.harbor.terminal_bench_1 import load_terminal_bench_1, needed_compose

MAX_TASK_DEPTH = 6  # folders between a dataset and its tasks
_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)|at end of document")
_DEEP_KEY = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){64}")
_CANARY = re.compile(r"\A\s*(?:<!--[^>]*canary[^>]*-->|#[^\n]*canary[^\n]*)\n", re.IGNORECASE)


def load_task(path: str | pathlib.Path, environ: Mapping[str, str] | None = None) -> HarborTask:
    """The task in this folder, of whichever format its settings file says it is. Raises TaskError.

    environ: what ${NAME} in the settings' env tables is filled in from. The environment of this
    process is never looked at.
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
    """Every task below a folder, by name.

    With `skip_malformed` a list, faults are put there instead of raised.

    Raises TaskError for a malformed task, a folder without tasks, or two tasks of one name.
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
    """The line of a task's settings file where this key is set; 0 where that cannot be seen (the
    file is in an archive, or another process's).
    """
    try:
        return (
            _toml_line(read_text(task.path / "task.toml"), path) if task.format == "harbor" else 0
        )
    except TaskError:
        return 0


# -- Harbor
# -------------------------------------------------------------------------------------------------


def load_harbor(folder: pathlib.Path, environ: Mapping[str, str]) -> HarborTask:
    file = folder / "task.toml"
    text = read_text(file)
    table = Table(file, parse_toml(file, text), lambda path: _toml_line(text, path), environ)
    version = table.values.get("schema_version", table.values.get("version", "1.0"))
    table.known |= {"schema_version", "version"}
    if not isinstance(version, str) or not re.fullmatch(r"1(\.\d+)*", version):
        raise table.fault(
            "schema_version" if "schema_version" in table.values else "version",
            f"{version!r} is no schema version that is known here (1.0 to 1.4)",
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
    defaults = _Phases.of(table)
    environment = _environment(folder / "environment", table.table("environment"))
    task = HarborTask(
        name=about.text("name") or folder.resolve().name,
        path=folder,
        format="harbor",
        schema_version=version,
        environment=environment,
        steps=tuple(_steps(folder, table, step_tables, defaults, environment)),
        reward_strategy=strategy,
        difficulty=_word(metadata, "difficulty"),
        category=_word(metadata, "category"),
        tags=(
            tuple(str(tag) for tag in metadata.get("tags", ()))
            if isinstance(metadata.get("tags", ()), list)
            else ()
        ),
        metadata=metadata,
        artifacts=tuple(table.get("artifacts", list, [])),
    )
    table.known.add("source")
    return HarborTask(**{**vars(task), "unknown_keys": tuple(table.unknown())})


def _word(metadata: dict, key: str) -> str:
    value = metadata.get(key, "")
    return value if isinstance(value, str) else str(value)


class _Phases:
    """The settings of the agent, the verifier and the solution that steps inherit."""

    @classmethod
    def of(cls, table: Table, parent: _Phases | None = None) -> _Phases:
        phases = cls()
        agent = table.table("agent")
        verifier = table.table("verifier")
        solution = table.table("solution")
        networks = dict(parent.networks) if parent else {}
        for phase in (agent, verifier):
            phase.known |= {
                "network_mode",
                "allowed_hosts",
            }  # not "user": commands run as the one user of a sandbox, and unknown_keys says so
            mode = phase.text("network_mode")
            _network(phase, mode)
            if mode is not None:
                networks[phase.path[-1]] = (mode, phase.texts("allowed_hosts"))
        phases.networks = networks
        phases.agent_timeout = agent.seconds(
            "timeout_sec", parent.agent_timeout if parent else None
        )
        phases.verifier_timeout = verifier.seconds(
            "timeout_sec", parent.verifier_timeout if parent else 600.0
        )
        phases.verifier_env = (parent.verifier_env if parent else {}) | verifier.environment("env")
        phases.solution_env = (parent.solution_env if parent else {}) | solution.environment("env")
        phases.collect = tuple(_collect_command(hook) for hook in verifier.tables("collect")) or (
            parent.collect if parent else ()
        )
        own = verifier.table("environment") if "environment" in verifier.values else None
        mode = verifier.text(
            "environment_mode", "separate" if own or (parent and parent.separate) else "shared"
        )
        if mode not in ("shared", "separate"):
            raise verifier.fault("environment_mode", f'{mode!r} is neither "shared" nor "separate"')
        if own and mode == "shared":
            raise verifier.fault(
                "environment_mode", '"shared" beside a verifier.environment; leave one of them out'
            )
        phases.separate = mode == "separate"
        phases.verifier_environment = own or (parent.verifier_environment if parent else None)
        return phases


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
        return [
            Step(
                "task",
                instruction,
                tests,
                solution=solution,
                solve_script=_solve(solution),
                artifacts=artifacts,
                verifier_environment=_verifier_environment(
                    defaults, (folder / "tests",), environment
                ),
                **_of_phases(defaults),
            )
        ]
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
        place = folder / "steps" / name
        step_tests = {**tests, **read_folder(place / "tests")}
        step_solution = read_folder(place / "solution")
        _need_test(place / "tests" / "test.sh", step_tests)
        phases = _Phases.of(step, defaults)
        found.append(
            Step(
                name,
                _instruction(place / "instruction.md"),
                step_tests,
                solution=step_solution,
                solve_script=_solve(step_solution),
                setup=read_folder(place / "workdir"),
                min_reward=_min_reward(step),
                healthcheck=_healthcheck(step),
                artifacts=(*artifacts, *_artifacts(step)),
                verifier_environment=_verifier_environment(
                    phases, (place / "tests", folder / "tests"), environment
                ),
                **_of_phases(phases),
            )
        )
    return found


def _of_phases(phases: _Phases) -> dict:
    return dict(
        agent_timeout=phases.agent_timeout,
        verifier_timeout=phases.verifier_timeout,
        verifier_env=phases.verifier_env,
        solution_env=phases.solution_env,
        networks=phases.networks,
        collect=phases.collect,
    )


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
    """Where the tests run, if that is not where the agent was: built from the Dockerfile in the
    first of these folders that has one, by the verifier's own settings or the agent's.
    """
    if not phases.separate:
        return None
    place = next((one for one in places if (one / "Dockerfile").exists()), places[-1])
    table = phases.verifier_environment
    found = (
        _environment(place, table)
        if table
        else dataclasses.replace(
            agents, **_definition(place), docker_image=None, healthcheck=None, mcp_servers=()
        )
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
    """Where they lie, for the agent and for a separate verifier; the `destination` of an entry
    names a place in Harbor's reports.
    """
    found = []
    for entry in table.get("artifacts", list, []):
        source = entry.get("source") if isinstance(entry, dict) else entry
        if not isinstance(source, str) or not source.startswith("/") or "\0" in source:
            raise table.fault("artifacts", f"{str(entry)[:60]!r} names no absolute path")
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


def _solve(solution: Files) -> str | None:
    return "solve.sh" if "solve.sh" in solution else None


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


def _network(table: Table, mode: object) -> None:
    if mode is not None and mode not in NETWORK_MODES:
        raise table.fault("network_mode", f"{mode!r} is none of {', '.join(NETWORK_MODES)}")


def _definition(place: pathlib.Path) -> dict[str, Any]:
    """What a folder says of an environment that is built from it."""
    context = read_folder(place)
    return dict(
        context=context,
        dockerfile=(
            read_text(place / "Dockerfile", MAX_DOCKERFILE_BYTES)
            if "Dockerfile" in context
            else None
        ),
        dockerfile_path=place / "Dockerfile",
        compose_path=needed_compose(place),
    )


def _environment(place: pathlib.Path, table: Table) -> Environment:
    allowed = table.get("allow_internet", bool, True)
    mode = table.text("network_mode") or ("public" if allowed else "no-network")
    _network(table, mode)
    cpus = table.number("cpus", None, above=0.0)
    for key in ("os", "gpu_types", "tpu", "skills_dir", "start_period_env_sec"):
        table.known.add(key)
    workdir = table.text("workdir")
    if workdir is not None and not workdir.startswith("/"):
        raise table.fault("workdir", f"{workdir!r} is no absolute path")
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
    """Tables that are only handed on."""
    found = table.tables(key)
    for entry in found:
        entry.known |= set(entry.values)
    return [entry.values for entry in found]


# -- TOML
# -------------------------------------------------------------------------------------------------


def parse_toml(file: pathlib.Path, text: str) -> dict:
    """TaskError with the line where it is not TOML."""
    if deep := _DEEP_KEY.search(text):  # the parser takes time with the square of a key's length
        raise TaskError(file, text.count("\n", 0, deep.start()) + 1, "a key of more than 64 parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_LINE.search(str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        raise TaskError(file, line, f"not TOML: {error}") from error
    except (
        RecursionError,
        ValueError,
        OverflowError,
    ) as error:  # nested beyond all measure; a date or an integer beyond all measure
        raise TaskError(
            file, 1, f"not TOML that can be read: {type(error).__name__}: {str(error)[:80]}"
        ) from error


def _toml_line(text: str, path: tuple[str, ...]) -> int:
    """Where a key is set, as well as it can be seen without a parser that keeps lines: first in its
    own table, then anywhere.
    """
    if not path:
        return 1
    header = ""
    last = path[-1]
    table = ".".join(path[:-1])
    candidates = []
    for number, row in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?", row):
            header = match[1].replace('"', "").replace(" ", "")
            if header == ".".join(path):
                candidates.append((0, number))
        if re.match(rf"\s*[\"']?{re.escape(last)}[\"']?\s*[=.]", row):
            candidates.append((1 if header == table else 2, number))
        elif len(path) > 1 and re.match(
            rf"\s*{re.escape(path[-2])}\s*=\s*\{{.*\b{re.escape(last)}\b", row
        ):
            candidates.append((3, number))
        elif header == table and table:
            candidates.append((9, number))
    return min(candidates, default=(0, 1))[1]
