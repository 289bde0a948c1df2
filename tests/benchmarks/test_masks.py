"""The ablation of masks: what is planted stays a readable record, and the labels are as many."""

import random

from benchmarks.masks import error_rates, only, plant
from rome.data.lines import ExampleOptions, to_examples
from rome.data.relevance import irrelevant_turns
from rome.data.trajectory import Chunk, Trajectory
from rome.model.tokenizer import TINY, Chat, Tokenizer

CHAT = Chat(Tokenizer.load(TINY))


def demonstration():
    chunks = []
    prompt_ids = CHAT.open("Sort harbor.txt into meadow.txt.")
    for command, answer in (("cat harbor.txt", "3\n1"), ("sort harbor.txt > meadow.txt", "")):
        call = {"name": "shell", "arguments": {"command": command}}
        text = CHAT.say("", [(call["name"], call["arguments"])])
        ids = CHAT.turn(text)
        chunk = Chunk(prompt_ids, ids, [0.0] * len(ids), text=text, tool_call=call)
        chunk.observation, chunk.kind = answer, "imitation"
        chunks.append(chunk)
        prompt_ids = CHAT.observe([answer])
    return Trajectory(
        "t", "f", chunks, 1.0, "success", instruction="Sort harbor.txt into meadow.txt."
    )


def test_planted_turns_read_as_an_agents_and_rel_finds_them():
    options = ExampleOptions(2048, 32, gamma=1.0, failure_reward=0.0, purpose="sft")
    found = set()
    for seed in range(30):
        trajectory, bad = plant(demonstration(), CHAT, random.Random(seed))
        found |= set(irrelevant_turns(trajectory).values())
        assert set(irrelevant_turns(trajectory)) == bad
        [example] = to_examples(trajectory, 0.0, options)
        text = CHAT.tokenizer.decode(list(map(int, example["tokens"])))
        assert text.count("<|im_start|>assistant") == len(trajectory.chunks)
        scored = only(trajectory, bad)
        assert {n for n, chunk in enumerate(scored.chunks) if chunk.kind == "imitation"} == bad
    assert found == {"loops", "duplicates", "off_task"}


def test_the_rates_are_of_600_turns():
    rates = error_rates()
    assert rates["labelled"] == 600 == sum(of for _, of in rates["by_kind"].values())
