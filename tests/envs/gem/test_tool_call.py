"""A turn is split into thoughts and speech, and the calls that it says are read in every form.

What cannot be read says why, in words for the model.
"""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from envs.gem import ToolCall, ToolCallError, format_tool_call, parse_tool_calls, read_turn
from envs.gem.tool_call import MAX_DRAFTS, iterate_tool_calls

MARKUP = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<function=bash>",
        "</function>",
        "<parameter=command>",
        "</parameter>",
        "<think>",
        "</think>",
        "<tool_name>bash</tool_name>",
        "<arguments>{}</arguments>",
        "<|im_end|>",
        "Infinity",
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


TAGS = MARKUP.filter(lambda piece: len(piece) < 100)
# commands with every tag, fence and quote that a command can spell
COMMANDS = st.lists(
    st.one_of(TAGS, st.sampled_from(["```", "<<'EOF'", "\nEOF\n", "'"]), st.text(max_size=5)),
    max_size=8,
).map("".join)
LS = format_tool_call("bash", {"command": "ls"})


def coder_call(command):
    return (
        "<tool_call>\n<function=bash>\n<parameter=command>\n"
        f"{command}\n</parameter>\n</function>\n</tool_call>"
    )


@given(
    name=st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
    arguments=st.dictionaries(st.text(), JSON, max_size=4),
)
def test_a_call_written_as_qwen3_does_is_read_back(name, arguments):
    calls = parse_tool_calls("I will look.\n" + format_tool_call(name, arguments))
    assert calls == [ToolCall(name, arguments)]


@given(command=COMMANDS, thoughts=st.one_of(st.none(), COMMANDS))
def test_every_command_is_read_back_after_any_thoughts(command, thoughts):
    turn = "" if thoughts is None else f"<think>{thoughts}\n</think>\n"
    call = format_tool_call("bash", {"command": command})
    assert parse_tool_calls(turn + call) == [ToolCall("bash", {"command": command})]
    raw_line_breaks = call.replace("\\n", "\n") if "\\\\" not in call else call
    assert parse_tool_calls(turn + raw_line_breaks) == [ToolCall("bash", {"command": command})]


@example("</think><tool_call></think>")
@given(command=COMMANDS)
def test_coders_form_carries_whatever_does_not_spell_its_own_end(command):
    _, _, rest = command.partition("</think>")
    # A call opened after the end of thoughts makes what stands before a draft.
    if "</parameter>" in command or "<tool_call>" in rest or "<function=" in rest:
        with contextlib.suppress(ToolCallError):
            parse_tool_calls(coder_call(command))
        return
    assert parse_tool_calls(coder_call(command)) == [ToolCall("bash", {"command": command})]


@pytest.mark.parametrize(
    "command",
    [
        "cat <<'E'\n<parameter=x>\n</function>\n</tool_call>\nE",
        "echo '</parameter>' '</function>'",
        "echo '</think>'",
    ],
)
def test_coders_form_keeps_tags_in_a_value(command):
    assert parse_tool_calls(coder_call(command)) == [ToolCall("bash", {"command": command})]


def test_a_coder_call_that_holds_a_whole_call_is_not_run_by_halves():
    with pytest.raises(ToolCallError, match="outside of a tool call"):
        parse_tool_calls(coder_call(f"cat > doc <<'E'\n{coder_call('ls')}\nE"))


@pytest.mark.parametrize(
    "thoughts",
    [
        "Calls go between <tool_call> tags.",
        f"Perhaps {LS} would do.",
        f"Perhaps {LS}, or {coder_call('pwd')}.",
        "Or </tool_call>, or {, or <function=bash>.",
        "<tool_call>\n<function=bash>\n<parameter=command>\nrm -r x",
        '<tool_call>{"name": "bash", "arguments": {"command": "rm',
        "I end my thoughts with </think>. Do I? " + LS,
    ],
)
@pytest.mark.parametrize("begin", ["<think>\n", ""])
def test_only_what_follows_the_thoughts_is_said(thoughts, begin):
    wanted = [ToolCall("bash", {"command": "ls"})]
    for call in (LS, coder_call("ls")):
        assert parse_tool_calls(f"{begin}{thoughts}\n</think>\n{call}") == wanted
    hand_in = f"{begin}{thoughts}\n</think>\n\ndone<|im_end|>\n"
    assert parse_tool_calls(hand_in) == []
    assert read_turn(hand_in).spoken.strip() == "done"


def test_a_turn_that_never_ends_its_thoughts_says_nothing():
    for turn in ("<think>", f"\n<think>I would call {LS}", f"<think>{LS}\n\\boxed{{1}}"):
        assert read_turn(turn).spoken == "" and read_turn(turn).is_thinking
        with pytest.raises(ToolCallError, match="</think>"):
            parse_tool_calls(turn)
    assert parse_tool_calls(f"I use the <think> tag. {LS}") != []


def test_the_end_of_a_call_is_found_in_the_turn_itself():
    turn = f"<think>{LS}</think> a {LS} b {coder_call('pwd')} c"
    ends = [end for _, end in iterate_tool_calls(turn)]
    assert [turn[end:] for end in ends] == [f" b {coder_call('pwd')} c", " c"]


def test_broken_drafts_do_not_make_reading_slow():
    drafts = '<tool_call>{"name":"' * 20_000
    assert drafts.count("<tool_call>") > MAX_DRAFTS
    assert parse_tool_calls(f"{drafts}</think>done") == []  # the suite's time limit
    assert read_turn("<|im_end|>" * 100_000 + "done" + "\n<|im_end|>" * 100_000).spoken == "done\n"


@pytest.mark.parametrize(
    "piece",
    [
        "<function=",
        "<function=a><parameter=",
        "<tool_call><function=a>",
        "<parameter=a></parameter>",
        "</parameter> </function>",
        "</think>",
        "<tool_call>{",
        "<tool_call><tool_name>",
    ],
)
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    much = piece * (1_000_000 // len(piece))
    for text in (much, f"{much}</think>done", f"<tool_call>{much}"):
        with contextlib.suppress(ToolCallError):
            parse_tool_calls(text)


def test_gems_form_is_read():
    text = (
        "<tool_call>\n<tool_name>add</tool_name>\n<arguments>\n"
        '{"text": "</arguments></tool_call>"}\n</arguments>\n</tool_call>'
    )
    assert parse_tool_calls(text) == [ToolCall("add", {"text": "</arguments></tool_call>"})]


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
        ('{"name": "bash"}\n</tool_call>', "</tool_call> stands outside of a tool call"),
        (LS + "\n</tool_call>", "</tool_call> stands outside of a tool call"),
        (LS.replace("}}", "}}}"), "text after its end"),
        ("<tool_call>\n```json\n{}\n```\n</tool_call>", "without a ``` fence"),
        (LS.replace("ls", "it\\'s"), "is no escape; write a backslash as"),
        (LS.replace("ls", 'echo "hi"'), "write a quote within a text as"),
        ('<tool_call>{"name": "bash", "arguments": {"command": "ls</tool_call>', "has no end"),
        (LS.replace('"ls"', "NaN"), "write a plain number"),
        (LS.replace('"ls"', "1e999"), "write a plain number"),
        (
            '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}\n</tool_call>',
            "something is missing before </tool_call>",
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
    assert len(str(error.value)) < 150


@given(text=TURNS)
def test_no_text_raises_anything_else(text):
    with contextlib.suppress(ToolCallError):
        assert isinstance(parse_tool_calls(text), list)


@given(text=TURNS)
def test_the_parts_of_a_turn_are_parts_of_it(text):
    turn = read_turn(text)
    assert text[turn.start : turn.start + len(turn.spoken)] == turn.spoken
    assert "</think>" not in turn.thoughts and "<think>" not in turn.thoughts
    assert len(turn.thoughts) + len(turn.spoken) <= len(text)
