"""Agents with a model: its answers are data, read strictly, and go through the same gates."""

import asyncio
import json

import pytest

from envs.tasks.made import FAMILIES, files_of
from envs.tasks.made.prove import judge_programs
from rome.agent.endpoint import Answer, EndpointError
from rome.synth.explore import Seed
from rome.synth.models import (
    AnswerError,
    Endpoints,
    audit_draft,
    read_draft,
    think_of_ideas,
    write_draft_of_idea,
)
from rome.synth.pipeline import Trace

SEED = Seed("idea", "data", "Add the numbers of each line")
INPUTS = [f"{number} {number + 1}\n" for number in range(7)] + [""]
SOLUTION = """\
import sys

for line in sys.stdin:
    a, b = line.split()
    print(int(a) + int(b))
"""
GOOD = {
    "language": "python",
    "instruction": "Print the sum of the two numbers of each line.",
    "solution": SOLUTION,
    "inputs": INPUTS,
}


class Chat:
    """Gives the same answer to all, and counts how often it is asked."""

    def __init__(self, text):
        self.text = text
        self.asked = 0

    async def ask(self, messages, **settings):
        self.asked += 1
        if isinstance(self.text, Exception):
            raise self.text
        usage = {"prompt_tokens": 5, "completion_tokens": 7}
        return Answer({"message": {"content": self.text}}, usage)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"language": "cobol"}, "cobol"),
        ({"solution": ""}, "solution is no text"),
        ({"instruction": 7}, "instruction is no text"),
        ({"inputs": ["1 2"]}, "8 texts or more"),
        ({"inputs": [1] * 9}, "an input is no text"),
    ],
)
def test_an_answer_of_another_form_is_no_draft(change, says):
    with pytest.raises(AnswerError, match=says):
        read_draft(SEED, {**GOOD, **change})
    with pytest.raises(AnswerError, match="list instead of an object"):
        read_draft(SEED, [])


def test_a_draft_expects_what_its_solution_prints_in_a_sandbox():
    chat = Chat(f"Here it is:\n```json\n{json.dumps(GOOD)}\n```")
    built = asyncio.run(write_draft_of_idea(Endpoints(chat), SEED, 0))
    (draft,) = built.drafts
    assert [case.stdout.strip() for case in draft.cases] == [
        "1",
        "3",
        "5",
        "7",
        "9",
        "11",
        "13",
        "",
    ]
    wrong = draft.oracle.replace("+", "-")
    assert [not f for f in asyncio.run(judge_programs(draft, [draft.oracle, wrong]))] == [
        True,
        False,
    ]


def test_no_answer_is_a_reason_and_no_objection():
    chat = Chat(EndpointError("it is gone"))
    built = asyncio.run(write_draft_of_idea(Endpoints(chat), SEED, 0))
    assert built.drafts == [] and "gone" in built.reason and built.is_fault
    assert asyncio.run(audit_draft(Endpoints(chat), FAMILIES["text"].make(1))) == ("", 0)
    objection = Chat('{"ok": false, "reason": "the order is not told"}')
    told = asyncio.run(audit_draft(Endpoints(objection), FAMILIES["text"].make(1)))
    assert "the order is not told" in told[0] and told[1] == 12


def test_an_answer_that_cannot_be_used_costs_tokens_all_the_same():
    built = asyncio.run(write_draft_of_idea(Endpoints(Chat("no JSON here")), SEED, 0))
    assert built.drafts == [] and built.tokens == 12 and not built.is_fault
    hostile = Chat(json.dumps({**GOOD, "instruction": "\ud800"}))
    built = asyncio.run(write_draft_of_idea(Endpoints(hostile), SEED, 0))
    assert built.drafts == [] and built.tokens == 12 and "surrogates" in built.reason


def test_a_fault_of_the_endpoint_is_asked_again_by_a_resumed_run(tmp_path):
    trace = Trace(tmp_path / "trace.jsonl")
    gone = Endpoints(Chat(EndpointError("it is gone")))
    assert asyncio.run(think_of_ideas(gone, 2, 0, trace, tmp_path)) == []
    again = Trace(tmp_path / "trace.jsonl")
    back = Endpoints(Chat('["sum numbers"]'))
    assert asyncio.run(think_of_ideas(back, 2, 0, again, tmp_path))


def test_a_shell_task_keeps_the_script_that_installs_its_program():
    draft = read_draft(SEED, {**GOOD, "language": "shell"})
    files = files_of(draft)
    assert f"/app/{draft.program}" in files["solution/solve.sh"][0].decode()
    assert files[f"solution/{draft.program}"][0].decode() == draft.oracle


def test_ideas_are_asked_for_once_and_their_tokens_are_counted(tmp_path):
    chat = Chat('["sum numbers", 7, "count words"]')
    trace = Trace(tmp_path / "trace.jsonl")
    first = asyncio.run(think_of_ideas(Endpoints(chat), 2, 0, trace, tmp_path))
    asked = chat.asked
    again = Trace(tmp_path / "trace.jsonl")
    assert asyncio.run(think_of_ideas(Endpoints(chat), 2, 0, again, tmp_path)) == first
    assert chat.asked == asked and again.tokens("explore") == 12 * asked
    assert {seed.value for seed in first} == {"sum numbers", "count words"}
