"""Reads Terminal-Bench 1 task folders into the record of a Harbor task.

A folder has task.yaml, Dockerfile, run-tests.sh, tests/ and solution.sh or solution.yaml. A task
passes when every test that the parser finds has passed. solution.yaml holds keystrokes for a
terminal. If each entry is a whole command it becomes a script. Otherwise (a command without Enter,
keys for an editor) the task counts as one without a reference solution.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

import yaml

from envs.tasks.harbor import dockerfile
from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.fields import (
    MAX_DOCKERFILE_BYTES,
    Table,
    need_unix_lines,
    read_folder,
    read_text,
    with_script,
)
from envs.tasks.harbor.task import Environment, HarborTask, Step

NOT_CONTEXT = (
    "task.yaml",
    "solution.sh",
    "solution.yaml",
    "run-tests.sh",
    "tests",
    "docker-compose.yaml",
    "docker-compose.yml",
)
PARSERS = ("pytest",)
# PyYAML raises all of these on malformed text.
_YAML_FAULTS = (
    yaml.YAMLError,
    RecursionError,
    ValueError,
    TypeError,
    OverflowError,
    AttributeError,
    LookupError,
)


def load_terminal_bench_1(folder: pathlib.Path) -> HarborTask:
    """Read a folder with a task.yaml. Raises TaskError."""
    table = _load_yaml(folder / "task.yaml")
    instruction = _instruction(table)
    parser = table.text("parser_name") or "pytest"
    if parser not in PARSERS:
        raise table.fault("parser_name", f"{parser!r} is not known here; {', '.join(PARSERS)} is")
    table.known |= {
        "author_name",
        "author_email",
        "max_test_timeout_sec",
        "expert_time_estimate_min",
        "junior_time_estimate_min",
        "estimated_duration_sec",
    }
    shared_shell = table.get("run_tests_in_same_shell", bool, False)
    tests = read_folder(folder / "tests")
    tests = with_script(tests, "run-tests.sh", _read_script(folder / "run-tests.sh"))
    solution, script = _solution(folder)
    category = table.text("category") or ""
    difficulty = table.text("difficulty") or ""
    tags = table.texts("tags")
    context = read_folder(folder, leave_out=_left_out(folder), as_context=True)
    step = Step(
        "task",
        instruction,
        tests,
        test_script="run-tests.sh",
        solution=solution,
        solve_script=script,
        parser=parser,
        agent_timeout=table.seconds("max_agent_timeout_sec", 360.0),
        verifier_timeout=table.seconds("max_test_timeout_sec", 60.0),
    )
    dockerfile = None
    if "Dockerfile" in context:
        dockerfile = read_text(folder / "Dockerfile", MAX_DOCKERFILE_BYTES)
    environment = Environment(
        context=context,
        dockerfile=dockerfile,
        dockerfile_path=folder / "Dockerfile",
        compose_path=needed_compose(folder),
    )
    return HarborTask(
        name=folder.resolve().name,
        path=folder,
        format="terminal-bench-1",
        schema_version="terminal-bench-1",
        environment=environment,
        steps=(step,),
        difficulty=difficulty,
        category=category,
        tags=tags,
        metadata={"run_tests_in_same_shell": shared_shell},
        unknown_keys=tuple(table.unknown()),
    )


def _read_script(path: pathlib.Path) -> str:
    text = read_text(path)
    need_unix_lines(path, text.encode())
    return text


def _left_out(folder: pathlib.Path) -> tuple[str, ...]:
    """Return the names that are no part of the build context.

    It is the whole task folder in Terminal-Bench, and `COPY . .` would give the agent tests and
    solution. Here they are copied only where the Dockerfile names them.
    """
    file = folder / "Dockerfile"
    if not file.exists():
        return NOT_CONTEXT
    try:
        instructions = dockerfile.parse(read_text(file, MAX_DOCKERFILE_BYTES), file)
    except TaskError:  # the build will say so, if the backend's reader does not take it either
        return NOT_CONTEXT
    named = []
    for instruction in instructions:
        if instruction.keyword in ("COPY", "ADD") and "from" not in instruction.flags()[0]:
            words = re.split(r"[\s\",\[\]]+", instruction.flags()[1])
            named += [posixpath.normpath(f"/{word}").split("/")[1] for word in words[:-1] if word]
    return tuple(name for name in NOT_CONTEXT if name not in named)


def needed_compose(folder: pathlib.Path) -> pathlib.Path | None:
    """Return a folder's docker-compose file if the Dockerfile beside it does not say everything.

    That is the case if there is no Dockerfile, or if the file has several services.
    """
    file = None
    for name in ("docker-compose.yaml", "docker-compose.yml"):
        if file is None and (folder / name).exists():
            file = folder / name
    if file is None:
        return None
    value, _ = parse_yaml(file)
    services = value.get("services") if isinstance(value, dict) else None
    if not isinstance(services, dict) or not services:
        raise TaskError(file, 1, "no services in it")
    says_all = len(services) == 1 and (folder / "Dockerfile").exists()
    return None if says_all else file


def _instruction(table: Table) -> str:
    """Return `instruction`, or the entry "base" of the older list `descriptions`."""
    text = table.text("instruction")
    for description in table.tables("descriptions"):
        if text is None and description.text("key") == "base":
            text = description.text("description")
    if not text or not text.strip():
        raise table.fault("instruction", "missing or empty")
    return text.strip() + "\n"


def _solution(folder: pathlib.Path) -> tuple[dict[str, tuple[bytes, int]], str | None]:
    if (folder / "solution.sh").exists():
        script = _read_script(folder / "solution.sh")
        return with_script({}, "solution.sh", script), "solution.sh"
    if not (folder / "solution.yaml").exists():
        return {}, None
    file = folder / "solution.yaml"
    commands, line_of = parse_yaml(file)
    if not isinstance(commands, list):
        raise TaskError(
            file, 1, f"a list of commands is needed, and this is a {type(commands).__name__}"
        )
    rows = []
    for index, entry in enumerate(commands):
        if not isinstance(entry, dict) or not isinstance(entry.get("command"), str):
            raise TaskError(file, line_of((str(index),)), f"entry {index + 1} has no command")
        if entry.get("append_enter") is False:
            return {}, None
        rows.append(entry["command"])
    return with_script({}, "solution.sh", "\n".join(rows) + "\n"), "solution.sh"


# -- YAML
# -------------------------------------------------------------------------------------------------


def _load_yaml(file: pathlib.Path) -> Table:
    value, line_of = parse_yaml(file)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TaskError(
            file, 1, f"a mapping of settings is needed, and this is a {type(value).__name__}"
        )
    return Table(file, value, line_of)


def parse_yaml(file: pathlib.Path) -> tuple[Any, Any]:
    """Return (the value, a function from a path of keys to a line). Raises TaskError."""
    text = read_text(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise TaskError(file, mark.line + 1 if mark else 1, f"not YAML: {error.problem}") from error
    except _YAML_FAULTS as error:
        raise TaskError(
            file, 1, f"not YAML that can be read: {type(error).__name__}: {str(error)[:80]}"
        ) from error
    return value, lambda path: _line(node, path)


def _line(node: yaml.Node | None, path: tuple[str, ...]) -> int:
    """Return the line of the last key of a path that exists."""
    line = node.start_mark.line + 1 if node else 1
    for key in path:
        found = _entry(node, key)
        if found is None:
            return line
        key_node, node = found
        line = key_node.start_mark.line + 1
    return line


def _entry(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the nodes of a key and of its value; for a list both are the entry's node."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return name, value
    if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
        entry = node.value[int(key)]
        return entry, entry
    return None
