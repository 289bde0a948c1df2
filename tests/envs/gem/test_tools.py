"""Tools: Python and shell in real sandboxes, and text that holds no call of any tool."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.gem import ToolCallError
from envs.gem.tools import BM25Index, PythonCodeTool, SearchTool, ShellTool
from envs.gem.tools.mcp import _first_call
from envs.rock import AgentFault, SandboxConfig

CONFIG = SandboxConfig(isolation="best_available")
TOOLS = [
    PythonCodeTool(timeout=60, sandbox_config=CONFIG),
    ShellTool(timeout=60, sandbox_config=CONFIG),
    SearchTool(BM25Index([("title", "text")])),
]


@pytest.fixture
def python():
    return PythonCodeTool(timeout=60, sandbox_config=CONFIG)


@pytest.mark.parametrize(
    ("action", "observation", "failed", "parsed"),
    [
        (
            "so <python>print(6*7)</python> then",
            "Code execution result: 42\n\n",
            False,
            "so <python>print(6*7)</python>",
        ),
        (
            "```python\nprint('a')\n``` and ```python\nprint('b')\n```",
            "Code execution result: a\n\n",
            False,
            "```python\nprint('a')\n```",
        ),
        (
            "```python\nprint(1)\n``` <python>print(2)</python>",
            "Code execution result: 1\n\n",
            False,
            "```python\nprint(1)\n```",
        ),
        (
            "<python>print(sqrt(16), Counter('aab')['a'])</python>",
            "Code execution result: 4.0 2\n\n",
            False,
            None,
        ),  # after the usual imports
        (
            "<python>...</python>",
            "Code execution result: SyntaxError: invalid syntax\n",
            True,
            None,
        ),
    ],
)
def test_python_runs_the_first_block(python, action, observation, failed, parsed):
    found, has_error, told, parsed_action = python.execute_action(action)
    assert found and has_error is failed and told == observation
    assert parsed_action == (parsed or action)


def test_a_python_error_is_told_whole_or_by_its_last_line(python):
    action = "<python>print('before')\n1/0</python>"
    found, has_error, told, _ = python.execute_action(action)
    assert (
        found
        and has_error
        and "before" in told
        and "Traceback" in told
        and told.endswith("ZeroDivisionError: division by zero\n")
    )
    short = PythonCodeTool(keep_error_last_line=True, sandbox_config=CONFIG).execute_action(action)[
        2
    ]
    assert short == "Code execution result: before\n\nZeroDivisionError: division by zero\n"


def test_a_program_that_does_not_end_is_stopped():
    told = PythonCodeTool(timeout=0.5, sandbox_config=CONFIG).execute_action(
        "<python>while True: pass</python>"
    )
    assert told[:3] == (
        True,
        True,
        "Code execution result: Execution timed out after 0.5 seconds.\n",
    )


def test_python_leaves_nothing_to_the_next_call_and_does_not_run_here(
    python, tmp_path, monkeypatch
):
    monkeypatch.setenv("A_SECRET", "of this process")
    mark = tmp_path / "mark"
    code = f"""import os
print(os.environ.get('A_SECRET'), os.path.exists('left'))
open('left', 'w').close()
try:
    open({str(mark)!r}, 'w')
except OSError:
    pass
"""
    for _ in range(2):
        assert (
            python.execute_action(f"<python>{code}</python>")[2]
            == "Code execution result: None False\n\n"
        )
    assert not mark.exists()


def test_the_shell_keeps_files_for_the_episode_and_no_longer():
    tool = ShellTool(timeout=60, max_output_chars=50, sandbox_config=CONFIG)
    other = tool.spawn()
    try:
        assert tool.execute_action("<bash>echo hi > note; pwd</bash> done")[1:] == (
            False,
            "Command output: /workspace\n",
            "<bash>echo hi > note; pwd</bash>",
        )
        assert tool.execute_action("```bash\ncat note\n```")[2] == "Command output: hi\n"
        assert tool.execute_action("<bash>exit 3</bash>")[1:3] == (
            True,
            "Command output: (none)\n[exit 3]\n",
        )
        assert tool.execute_action("<bash>seq 100</bash>")[2].endswith("... (241 more)\n")
        assert other.execute_action("<bash>cat note</bash>")[1] is True
        tool.reset()
        assert tool.execute_action("<bash>cat note</bash>")[1] is True
    finally:
        tool.close(), tool.close(), other.close()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.tool_type)
@given(
    text=st.lists(
        st.text(max_size=5)
        | st.sampled_from(["<python>", "</bash>", "<search>", "```python", "```bash\n"]),
        max_size=3,
    ).map("".join)
)
def test_text_without_a_complete_call_is_none(tool, text):
    if text.count("```") < 2:
        assert tool.execute_action(text)[:3] == (False, True, "")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.tool_type)
@pytest.mark.parametrize(
    "text",
    [
        "<python>" * 100_000,
        "<bash>" * 100_000,
        "<search>" * 100_000,
        "```python\n" + "x" * 1_000_000,
        "<tool_call><tool_name>x</tool_name><arguments>" * 20_000,
    ],
)
def test_a_megabyte_without_an_end_is_read_in_linear_time(tool, text):
    assert tool.execute_action(text)[0] is False  # the suite's time limit is the assertion
    with contextlib.suppress(ToolCallError):
        assert _first_call(text) is None


@pytest.mark.parametrize("kind", [ShellTool, PythonCodeTool])
def test_what_a_program_did_to_its_sandbox_is_an_observation(monkeypatch, kind):
    def broken(*_):
        raise AgentFault("2 processes survived SIGKILL for 10 s")

    monkeypatch.setattr(kind, "run_block", broken)
    found, failed, observation, _ = kind().execute_action(f"<{kind.tag}>x</{kind.tag}>")
    assert found and failed and "survived" in observation
