"""Chats that require a call of a tool: the answer is one, in the form that the model knows."""

import numpy as np
import pytest
import tokenizers

from envs.gem.tool_call import parse_tool_calls
from rome.model.tokenizer import TINY, Tokenizer
from rome.serve.checks import BadRequest
from rome.serve.grammar import make_grammar
from rome.serve.required_calls import call_grammar
from tests.rome.model.tokenizer.test_chat import written

TOKENIZER = Tokenizer.load(TINY)
LEVEL = {
    "type": "object",
    "properties": {"level": {"$ref": "#/$defs/level"}, "ok": {"type": "boolean"}},
    "required": ["level"],
    "additionalProperties": False,
    "$defs": {"level": {"enum": [1, 'h"\\i\n']}},
}


def tool(name, parameters=None):
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("set", LEVEL), tool('odd "näme"\\', LEVEL)]


def named(name):
    return {"type": "function", "function": {"name": name}}


def asked(choice, tools=TOOLS, tokenizer=TOKENIZER, **more):
    return call_grammar({"tool_choice": choice, "tools": tools} | more, tools, tokenizer)


def grammar_of(text, tokenizer):
    return make_grammar(
        "ebnf", text, tokenizer, tokenizer.vocab_size, frozenset({tokenizer.im_end})
    )


def accepts(grammar, text, tokenizer=TOKENIZER):
    """Whether a grammar lets an answer say all of a text, and end there."""
    followed = grammar_of(grammar, tokenizer)
    ids = tokenizer.encode(text, allow_special=True)
    for token in [*ids, tokenizer.im_end]:
        if not followed.allowed()[token // 32] >> (token % 32) & 1:
            return False
        followed.take([token])
    return True


@pytest.mark.parametrize(
    "choice", ["required", named("set"), named(TOOLS[1]["function"]["name"])], ids=str
)
def test_whatever_is_drawn_calls_what_must_be_called(choice):
    pytest.importorskip("llguidance")
    rng = np.random.default_rng(0)
    for _ in range(3):
        followed = grammar_of(asked(choice, parallel_tool_calls=False), TOKENIZER)
        ids = []
        while not followed.is_complete:
            bits = np.unpackbits(followed.allowed().view(np.uint8), bitorder="little")
            ids.append(int(rng.choice(np.flatnonzero(bits))))
            assert followed.take(ids[-1:]) == ""
        (call,) = parse_tool_calls(TOKENIZER.decode(ids, skip_special=True))
        assert choice == "required" or choice["function"]["name"] == call.name
        assert call.arguments["level"] in LEVEL["$defs"]["level"]["enum"]


CALL = '<tool_call>\n{"name": "set", "arguments": {"level": 1, "ok": true}}\n</tool_call>'


def test_calls_are_one_or_several_as_was_asked():
    pytest.importorskip("llguidance")
    assert accepts(asked("required"), CALL) and accepts(asked("required"), f"{CALL}\n{CALL}")
    single = asked("required", parallel_tool_calls=False)
    assert accepts(single, CALL) and not accepts(single, f"{CALL}\n{CALL}")
    assert not accepts(asked(named("set")), f"{CALL}\n{CALL}")
    for other in ("", "I call.", CALL.replace("level", "leve"), CALL.replace("set", "get")):
        assert not accepts(asked("required"), other)
    free = asked("required", [tool("set")])
    assert accepts(free, CALL) and not accepts(free, CALL.replace("true}", "[]}}"))
    assert asked(None) is asked("auto") is asked("none") is None


@pytest.mark.parametrize(
    "choice, tools, words",
    [
        ("required", [], "needs a tool"),
        (named("get"), TOOLS, "named 'get'"),
        (named(5), TOOLS, "is not supported"),
        ({"type": "allowed_tools"}, TOOLS, "is not supported"),
        ("required", [tool("set", ["list"])], "no JSON schema"),
    ],
)
def test_a_call_of_nothing_is_refused(choice, tools, words):
    with pytest.raises(BadRequest, match=words):
        asked(choice, tools)


def with_template(kind, *tokens):
    """The tokenizer with further tokens, and the template of another family."""
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(token, special=False) for token in tokens])
    return Tokenizer(backend, chat_template=written(kind))


def test_another_form_of_calls_is_refused():
    with pytest.raises(BadRequest, match="<function=f>"):
        asked("required", tokenizer=with_template("coder"))


def test_thoughts_that_the_header_has_opened_come_before_the_call():
    pytest.importorskip("llguidance")
    with pytest.raises(BadRequest, match="</think>, which is no token"):
        asked("required", tokenizer=with_template("thinking"))
    thinking = with_template("thinking", "<think>", "</think>")
    grammar = asked("required", tokenizer=thinking)
    assert accepts(grammar, f"I think\nof é.\n</think>\n\n{CALL}", thinking)
    assert not accepts(grammar, CALL, thinking)
    hybrid = with_template("hybrid", "<think>", "</think>")
    assert accepts(asked("required", tokenizer=hybrid), CALL, hybrid)
