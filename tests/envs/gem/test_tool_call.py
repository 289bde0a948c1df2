"""Tool calls are read in both of Qwen's forms; what cannot be read says why, in words for the
model.
"""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.gem import ToolCall, ToolCallError, format_tool_call, parse_tool_calls

MARKUP = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<function=bash>",
        "</function>",
        "<parameter=command>",
        "</parameter>",
        '{"name": "bash", "arguments": {"command": "',
        '"}}',
        '"name"',
        "{",
        "}",
        "[",
        '"',
        "\\",
        "\n",
        " ",
        "bash",
        "ls",
        "\ud800",
        "\0",
        "9" * 5000,
        "[" * 20000,
    ]
)
TURNS = st.one_of(
    st.text(), st.lists(st.one_of(MARKUP, st.text(max_size=5)), max_size=12).map("".join)
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    name=st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
    arguments=st.dictionaries(st.text(), JSON, max_size=4),
)
def test_a_call_written_as_qwen3_does_is_read_back(name, arguments):
    if "</tool_call>" not in json.dumps(
        arguments, ensure_ascii=False
    ) and "<tool_call>" not in json.dumps(arguments, ensure_ascii=False):
        assert parse_tool_calls("I will look.\n" + format_tool_call(name, arguments)) == [
            ToolCall(name, arguments)
        ]


def test_a_call_written_as_qwen3_coder_does_is_read():
    text = (
        "<tool_call>\n<function=bash>\n<parameter=command>\ncat"
        " <<X\na\n\nX\n</parameter>\n<parameter=other>1</parameter>\n</function>\n</tool_call>"
    )
    assert parse_tool_calls(text) == [
        ToolCall("bash", {"command": "cat <<X\na\n\nX", "other": "1"})
    ]


def test_the_coder_form_is_read_without_its_outer_tag():
    text = "So:\n<function=bash>\n<parameter=command>\nls\n</parameter>\n</function>"
    assert parse_tool_calls(text) == [ToolCall("bash", {"command": "ls"})]
    assert len(parse_tool_calls(text + "\n" + text.removeprefix("So:\n"))) == 2


def test_several_calls_come_in_order():
    text = format_tool_call("a", {}) + "\n" + format_tool_call("b", {"x": 1})
    assert [call.name for call in parse_tool_calls(text)] == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["", "done", 'I would write {"name": "bash"} here', "a < b > c", "</function>"]
)
def test_a_turn_that_only_speaks_has_no_calls(text):
    assert parse_tool_calls(text) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}', "no </tool_call>"),
        ('{"name": "bash"}\n</tool_call>', "without <tool_call>"),
        (
            '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}\n</tool_call>',
            "not JSON: Expecting",
        ),
        ("<tool_call>\n\n</tool_call>", "not JSON"),
        ('<tool_call>\n["bash"]\n</tool_call>', '"name" and "arguments"'),
        ('<tool_call>\n{"name": "bash"}\n</tool_call>', '"name" and "arguments"'),
        (
            '<tool_call>\n{"name": "bash", "arguments": "ls"}\n</tool_call>',
            '"name" and "arguments"',
        ),
        ('<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', '"name" and "arguments"'),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "too deep"),
        (
            '<tool_call>{"name": "bash", "arguments": {"n": ' + "9" * 5000 + "}}</tool_call>",
            "too long",
        ),
        (
            "<tool_call><function=bash><parameter=command>ls</parameter></tool_call>",
            "no </function>",
        ),
        ("<function=bash><parameter=command>ls</parameter>", "no </function>"),
        ("<function=bash>ls</function>", "<parameter=name>"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(text, says):
    with pytest.raises(ToolCallError, match=says.replace("(", r"\(")) as error:
        parse_tool_calls(text)
    assert len(str(error.value)) < 120


@given(text=TURNS)
def test_no_text_raises_anything_else(text):
    with contextlib.suppress(ToolCallError):
        assert isinstance(parse_tool_calls(text), list)
