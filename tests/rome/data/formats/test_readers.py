"""Every format is read to the same conversation; ids that a record gives are kept."""

import copy
import json

import pytest

from rome.data.formats.conversation import UnfitError
from rome.data.formats.detect import read_record
from rome.data.formats.records import read_trajectory
from rome.data.formats.render import render
from rome.data.trajectory import Chunk, Trajectory, to_atif
from rome.model.tokenizer import TINY, Chat, Tokenizer
from tests.rome.data.formats import samples

TOKENIZER = Tokenizer.load(TINY)


def read(record):
    return read_trajectory(json.dumps(record).encode(), TOKENIZER)


def ids(trajectory):
    return [(chunk.prompt_ids, chunk.action_ids) for chunk in trajectory.chunks]


@pytest.mark.parametrize("name", samples.ALL)
def test_a_format_is_known_by_its_content_and_read_to_the_same_ids(name):
    found, conversation = read_record(samples.ALL[name])
    assert found == name
    trajectory = render(conversation, TOKENIZER)
    assert [chunk.text for chunk in trajectory.chunks] == samples.TEXTS
    assert ids(trajectory) == ids(read(samples.OPENAI))


def test_a_list_of_messages_is_a_conversation_without_tools():
    trajectory = read(samples.MESSAGES)
    chat = Chat(TOKENIZER, None, "Be brief.")
    assert trajectory.family == "messages"
    assert trajectory.chunks[0].prompt_ids == chat.open("How many files are there?")


def test_the_ids_are_those_of_the_chat_template_and_only_the_assistants_text_is_learned():
    trajectory = read(samples.OPENAI)
    chat = Chat(TOKENIZER, [samples.TOOL], "Be brief.")
    assert ids(trajectory) == [
        (chat.open("How many files are there?"), chat.turn(samples.TEXTS[0])),
        (chat.observe(["total 2"]), chat.turn("There are 2.")),
    ]
    assert {chunk.kind for chunk in trajectory.chunks} == {"imitation"}


def sampled(**changes):
    """A rollout of our own in ATIF."""
    chat = Chat(TOKENIZER)
    turn = chat.turn("ls")
    chunk = Chunk(chat.open("go"), turn, [-0.5] * len(turn), versions=[(3, 0, len(turn))])
    again = Chunk(chat.observe(["x"]), turn, [-0.25] * len(turn), kind="imitation", text="ls")
    trajectory = Trajectory("t/1", "t", [chunk, again], 1.0, "success")
    return to_atif(Trajectory(**(trajectory.__dict__ | changes))), trajectory


def test_our_own_files_keep_their_ids_and_logprobs():
    document, trajectory = sampled()
    found = read(document)
    assert ids(found) == ids(trajectory)
    assert found.chunks[0].logprobs == trajectory.chunks[0].logprobs


def test_ids_of_harbors_steps_are_kept():
    record = copy.deepcopy(samples.ATIF)
    _, trajectory = sampled()
    history = []
    for step, chunk in zip(record["steps"][2:], trajectory.chunks, strict=True):
        history = history + chunk.prompt_ids
        step["metrics"] = {
            "prompt_token_ids": history,
            "completion_token_ids": chunk.action_ids,
            "logprobs": chunk.logprobs,
        }
        history = history + chunk.action_ids
    assert ids(read(record)) == ids(trajectory)
    record["steps"][3]["metrics"]["prompt_token_ids"] = [1, *history]
    with pytest.raises(UnfitError, match=r"turn 2 does not go on .* tokenised anew"):
        read(record)


def nemo_with_ids():
    record = copy.deepcopy(samples.NEMO_GYM)
    output = record["response"]["output"]
    _, trajectory = sampled()
    first, second = trajectory.chunks
    whole = first.prompt_ids + first.action_ids + second.prompt_ids
    for item, prompt, chunk in ((output[1], first.prompt_ids, first), (output[3], whole, second)):
        item["prompt_token_ids"] = list(map(str, prompt))  # older files spell them as texts
        item["generation_token_ids"] = chunk.action_ids
        item["generation_log_probs"] = chunk.logprobs
    output[3]["content"][0]["text"] = "ls"
    return record, trajectory


def test_the_better_answer_of_a_pair_is_learned_and_its_prompt_only_read():
    messages = samples.MESSAGES
    pair = {"prompt": messages[:4], "chosen": messages[4:], "rejected": [], "tools": [samples.TOOL]}
    trajectory = read(pair)
    assert ids(trajectory) == ids(read(samples.OPENAI))
    assert [chunk.kind for chunk in trajectory.chunks] == ["context", "imitation"]
    texts = read({"prompt": "How many?", "chosen": "Two.", "rejected": "Three."})
    assert [chunk.text for chunk in texts.chunks] == ["Two."]


def test_ids_of_nemo_gyms_items_are_kept():
    record, trajectory = nemo_with_ids()
    assert ids(read(record)) == ids(trajectory)


def change(record, path, value):
    """Return a copy of a record with another value at a path of keys."""
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


OUTPUT = ("response", "output")


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ((*OUTPUT, 3, "content", 0, "text"), "mkdir", "turn 2 do not spell its text"),
        ((*OUTPUT, 3, "generation_token_ids"), [99_999], "token id 99999, and the tokenizer has"),
        ((*OUTPUT, 1, "generation_token_ids"), [], "no sampled token"),
        ((*OUTPUT, 1, "generation_token_ids"), [1.5], "no token id"),
        ((*OUTPUT, 1, "generation_token_ids"), [-1], "no token id"),
        ((*OUTPUT, 1, "prompt_token_ids"), None, "not a list of token ids"),
        ((*OUTPUT, 1, "generation_log_probs"), [0.0], "one finite logprob for each"),
        ((*OUTPUT, 3, "generation_log_probs"), ["x"], "one finite logprob for each|not nemo_gym"),
    ],
)
def test_ids_that_do_not_fit_are_refused(path, value, complaint):
    record, _ = nemo_with_ids()
    if value == [99_999]:
        record = change(record, (*OUTPUT, 3, "generation_log_probs"), [0.0])
    with pytest.raises(UnfitError, match=complaint):
        read(change(record, path, value))


def test_what_comes_after_the_last_ids_belongs_to_no_turn():
    record, _ = nemo_with_ids()
    record["response"]["output"].append({"type": "message", "role": "assistant", "content": "x"})
    with pytest.raises(UnfitError, match=r"item 5 .* belongs to no turn with token ids"):
        read(record)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("messages",), {"a": 1}, "messages are a dict, not a list"),
        (("messages",), [], "begins with nobody"),
        (("messages", 1), 7, "message 2 is a int"),
        (("messages", 1, "role"), "wizard", "role 'wizard'; known: system"),
        (("messages", 1, "role"), ["user"], "role"),
        (("messages", 1, "content"), 7, "message 2 is a int, not text"),
        (("messages", 1, "content"), [{"type": "image_url"}], "part of the type 'image_url'"),
        (("messages", 1, "content"), [3], "part of the type 'int'"),
        (("messages", 1, "content"), "\ud800", "surrogate"),
        (("messages", 1, "role"), "assistant", "begins with assistant"),
        (("messages", 2, "tool_calls"), "x", "str as tool_calls"),
        (("messages", 2, "tool_calls"), ["x"], "no object"),
        (("messages", 2, "tool_calls", 0, "function", "name"), None, "without a name"),
        (("messages", 2, "tool_calls", 0, "function", "arguments"), 3, "int as arguments"),
        (("messages", 4, "content"), " ", "message 5, an assistant's, is empty"),
        (("tools",), {"a": 1}, "tools are a dict"),
        (("tools",), "{", "no JSON"),
        (("tools",), [3], "a tool is a int"),
        (("tools",), [{}], "a tool has no name"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_their_number(path, value, complaint):
    with pytest.raises(UnfitError, match=complaint):
        read(change(samples.OPENAI, path, value))


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"a": 1}, "no format is known that has the keys a"),
        ({}, r"keys \(none\)"),
        ([], "an empty list"),
        ("text", "not a str"),
        (None, "not a NoneType"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "from 'cat'; known: system, human"),
        ({"conversations": "x"}, "conversations are a str"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "no JSON object"),
        ({"traj": 1, "reward": 1}, "messages are a int"),
        ({"schema_version": "ATIF-v1.6", "steps": [1]}, "steps are no list of objects"),
        (change(samples.ATIF, ("steps", 1, "source"), "cat"), "source 'cat'"),
        ({"responses_create_params": [], "response": {}}, "output is no list|not nemo_gym"),
        (change(samples.NEMO_GYM, (*OUTPUT, 0, "role"), "cat"), "item 1 is a 'message' of 'cat'"),
    ],
)
def test_records_of_no_known_form_are_refused(record, complaint):
    with pytest.raises(UnfitError, match=complaint):
        read(record)


def test_a_demonstration_in_the_context_is_read_and_not_learned():
    shown = change(samples.OPENAI, ("messages", 2, "is_demo"), True)
    assert [chunk.kind for chunk in read(shown).chunks] == ["context", "imitation"]
    assert ids(read(shown)) == ids(read(samples.OPENAI))
    last = change(samples.OPENAI, ("messages", 4, "weight"), 0)
    assert [chunk.kind for chunk in read(last).chunks] == ["imitation"]


def test_a_call_whose_arguments_are_no_object_is_read_and_not_learned():
    path = ("messages", 2, "tool_calls", 0, "function", "arguments")
    broken = read(change(samples.OPENAI, path, '{"command": '))
    assert [chunk.status for chunk in broken.chunks] == ["malformed", "ok"]


def test_thoughts_are_written_before_the_text():
    record = change(samples.OPENAI, ("messages", 4, "reasoning_content"), "\ntwo lines\n")
    assert read(record).chunks[1].text == "<think>\ntwo lines\n</think>\n\nThere are 2."


def test_notes_that_the_model_never_saw_are_left_out():
    messages = [*samples.MESSAGES, {"role": "exit", "content": "Submitted"}]
    assert ids(read({"messages": messages, "tools": [samples.TOOL]})) == ids(read(samples.OPENAI))
