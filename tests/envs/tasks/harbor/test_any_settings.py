"""Any text as a settings file gives a task or a typed error."""

import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envs.tasks.harbor import TaskError, load_task
from tests.envs.tasks.harbor.conftest import TB1, write

VALUE = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "1",
            "-1",
            "nan",
            "inf",
            "true",
            "[]",
            "{}",
            '"x"',
            "[1]",
            '"${A}"',
            "1979-05-27",
            "9" * 400,
            "[" * 2000,
            "{a=1}",
            '"2G"',
            "0x10",
            "1e400",
        ]
    ),
)
KEY = st.sampled_from(
    [
        "version",
        "schema_version",
        "timeout_sec",
        "name",
        "env",
        "memory",
        "memory_mb",
        "cpus",
        "gpus",
        "network_mode",
        "command",
        "min_reward",
        "workdir",
        "tags",
        "artifacts",
        "healthcheck",
        "instruction",
        "parser_name",
        "descriptions",
        "max_agent_timeout_sec",
        "multi_step_reward_strategy",
        "&a",
        "*a",
        "<<",
        "? ",
        "!!binary",
    ]
)
HEADER = st.sampled_from(
    [
        "[agent]",
        "[verifier]",
        "[environment]",
        "[environment.env]",
        "[environment.healthcheck]",
        "[[steps]]",
        "[steps.agent]",
        "[metadata]",
        "[task]",
        "[[environment.mcp_servers]]",
        "[",
    ]
)
TOML = st.lists(
    st.one_of(HEADER, st.tuples(KEY, VALUE).map(" = ".join), st.text(max_size=10)), max_size=8
).map("\n".join)
YAML = st.lists(
    st.one_of(
        st.tuples(KEY, VALUE).map(": ".join),
        st.text(max_size=10),
        st.sampled_from(["- a", "  b: c", "---", "...", "instruction: do"]),
    ),
    max_size=8,
).map("\n".join)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "tb", TB1)
    return write(
        folder / "task",
        {
            "task.toml": "",
            "instruction.md": "x",
            "tests/test.sh": "true",
            "steps/a/instruction.md": "y",
        },
    ).parent


def _loads_or_says_why(folder: pathlib.Path, name: str, text: str) -> None:
    (folder / name).write_bytes(
        text.encode(errors="surrogateescape")
        if text.isascii()
        else text.encode("utf-8", errors="replace")
    )
    try:
        assert load_task(folder).steps
    except TaskError as error:
        assert str(folder) in str(error) and error.line >= 0 and len(str(error)) < 600


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=TOML)
def test_any_task_toml_gives_a_task_or_a_typed_error(fuzzed, text):
    _loads_or_says_why(fuzzed / "task", "task.toml", text)


@pytest.mark.long
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=YAML)
def test_any_task_yaml_gives_a_task_or_a_typed_error(fuzzed, text):
    _loads_or_says_why(fuzzed / "tb", "task.yaml", text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("task.toml", "a = " + "[" * 20_000),
        ("task.toml", "a." * 20_000 + "b = 1"),
        ("task.yaml", "[" * 3_000),
        ("task.yaml", "a: 2024-99-99\ninstruction: x"),
        ("task.yaml", "instruction: x\n? [a, {b: c}]\n: d"),
        ("task.yaml", "a: 0x"),
        ("task.yaml", "&a a: *a"),
        ("task.yaml", "<<: 3"),
    ],
)
def test_texts_that_break_parsers_are_typed_errors_or_tasks(fuzzed, name, text):
    _loads_or_says_why(fuzzed / ("tb" if name == "task.yaml" else "task"), name, text)
