"""Answers that follow a JSON schema or a regular expression, and what is said about bad ones."""

import json
import re
import sys

import pytest

from rome.model.tokenizer import TINY, Tokenizer
from rome.serve.answer import make_answer
from rome.serve.checks import BadRequest
from rome.serve.openai_api import to_generate
from rome.serve.protocol import Bounds, parse_generate
from tests.rome.serve.test_adjusting import SHAPES
from tests.rome.serve.test_invariance import run
from tests.rome.serve.tiny import CONTEXT, make_config

TOKENIZER = Tokenizer.load(TINY)
BOUNDS = Bounds(TOKENIZER.vocab_size, CONTEXT, frozenset({TOKENIZER.im_end, TOKENIZER.pad}))
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ls", "cät"]}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # a random model would only draw spaces
}


def parse(tokenizer=TOKENIZER, **params):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 60} | params}
    return parse_generate(body, BOUNDS, tokenizer)[0][0]


def test_random_weights_answer_in_the_form_that_is_asked_for_and_others_as_ever():
    pytest.importorskip("llguidance")
    schemas = [parse(json_schema=json.dumps(SCHEMA), sampling_seed=seed) for seed in range(3)]
    patterns = [
        parse(regex=r"-?[0-9]{1,3}(\.[0-9]{1,4})? €", sampling_seed=seed) for seed in range(3)
    ]
    ebnf = 'root ::= "say " word (", " word)*\nword ::= "é"? [a-c]'
    grammars = [parse(ebnf=ebnf, sampling_seed=seed) for seed in range(3)]
    free = parse(sampling_seed=1, max_new_tokens=20, ignore_eos=True)
    alone = parse(sampling_seed=1, max_new_tokens=20, ignore_eos=True)
    run(SHAPES, [alone])
    run(SHAPES, [*schemas, free, *patterns, *grammars])
    assert (free.output_ids, free.logprobs) == (alone.output_ids, alone.logprobs)
    for request in schemas:
        answer = make_answer(request, "0", TOKENIZER)
        assert set(json.loads(answer["text"])) == {"name", "ok"}
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}
    for request in patterns:
        assert re.fullmatch(r"-?\d{1,3}(\.\d+)? €", make_answer(request, "0", TOKENIZER)["text"])
    for request in grammars:
        text = make_answer(request, "0", TOKENIZER)["text"]
        assert re.match(r"say é?[a-c](, é?[a-c])*", text)
    assert make_config().vocab_size == TOKENIZER.vocab_size


@pytest.mark.parametrize(
    "params, words",
    [
        ({"json_schema": "{"}, "json_schema cannot be followed"),
        ({"json_schema": "5"}, "json_schema cannot be followed"),
        ({"json_schema": '{"type": "nothing"}'}, "json_schema cannot be followed"),
        ({"regex": "(a"}, "regex cannot be followed"),
        ({"regex": "a", "tokenizer": None}, "no tokenizer"),
        ({"ebnf": 'wurzel ::= "a"'}, "ebnf cannot be followed: .*root"),
        ({"ebnf": "root ::= " + "(" * 100_000}, "ebnf cannot be followed"),
        ({"ebnf": "root ::= missing"}, "ebnf cannot be followed"),
        ({"ebnf": 'root ::= "a"', "regex": "a"}, "only one of json_schema, regex, ebnf"),
    ],
)
def test_what_is_no_grammar_is_refused(params, words):
    pytest.importorskip("llguidance")
    with pytest.raises(BadRequest, match=words):
        parse(**params)


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadRequest, match="requirements-grammar"):
        parse(regex="a")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, SCHEMA),
        ({"type": "text"}, None),
        (None, None),
    ],
)
def test_openais_response_format_is_a_schema(given, expected):
    asked = to_generate({"response_format": given}, (), is_chat=True)["sampling_params"]
    assert json.loads(asked.get("json_schema", "null")) == expected


@pytest.mark.parametrize("given", ["json", {"type": "xml"}, {"type": "json_schema"}, {}])
def test_another_response_format_is_refused(given):
    with pytest.raises(BadRequest, match="response_format"):
        to_generate({"response_format": given}, (), is_chat=True)
