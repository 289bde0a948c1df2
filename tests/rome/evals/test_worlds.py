"""Worlds, problems, games and published files as datasets: named, spread, evaluated by the same
agents and proven by the same proof.
"""

import asyncio
import json

import pytest
from aiohttp import web

from envs.gem import parse_tool_calls
from envs.sources import dataset_digest, load_tasks
from rome.agent.loop import Limits
from rome.evals.agents import Scripted
from rome.evals.cheats import CHEATS
from rome.evals.policy import Policy
from rome.evals.validate import judge
from tests.envs.worlds.test_published import write_bfcl
from tests.rome.evals.tasks import CONFIG
from tests.rome.evals.test_endpoint import Answers
from tests.rome.evals.test_endpoint import play as http
from tests.rome.rollout.worlds import CHAT, ScriptedEngine


def play(agent, task, attempt=0):
    return asyncio.run(agent.play(task, attempt, seed=1))


def proof_of(task):
    records = []
    for name, attempts in (("oracle", 1), ("noop", 1), ("cheat", len(CHEATS))):
        for attempt in range(attempts):
            outcome = play(Scripted(name, CONFIG), task, attempt)
            records.append(
                {
                    "agent": name,
                    "attempt": attempt,
                    "reward": outcome.reward,
                    "ending": outcome.ending,
                    "note": outcome.note,
                    "seconds": 0.0,
                }
            )
    return judge(task.name, records)


@pytest.mark.parametrize(
    "dataset", ["worlds", "problems:math:14", "problems:code/postfix-easy", "games"]
)
def test_generated_datasets_are_sound(dataset):
    tasks = load_tasks(dataset)
    assert tasks and [proof_of(task)["reasons"] for task in tasks] == [[] for _ in tasks]


def test_published_files_are_sound(tmp_path):
    (task,) = load_tasks(f"bfcl:{write_bfcl(tmp_path)}")
    assert task.name == "multi_turn_base_0" and proof_of(task)["reasons"] == []


def test_instances_are_spread_and_chosen_by_the_seed():
    tasks = load_tasks("worlds:shop/hard,gui:8")
    assert {task.name.rsplit("/", 1)[0] for task in tasks} == {
        "shop/hard",
        "gui/easy",
        "gui/medium",
        "gui/hard",
    } and len({task.name for task in tasks}) == 8
    assert {(task.domain, task.difficulty) for task in tasks} == {
        ("shop", "hard"),
        ("gui", "easy"),
        ("gui", "medium"),
        ("gui", "hard"),
    }
    assert dataset_digest(load_tasks("worlds:travel:6")) == dataset_digest(
        load_tasks("worlds:travel:6")
    )
    assert not {task.name for task in load_tasks("worlds:travel:6")} & {
        task.name for task in load_tasks("worlds:travel:6", seed=1)
    }
    assert (
        "policy" not in tasks[0].instruction.lower()
    )  # which many tasks share, and no corpus is contaminated by


@pytest.mark.parametrize(
    "name",
    [
        "worlds:nosuch",
        "worlds:shop:0",
        "worlds:shop:x",
        "problems:math/nosuch",
        "games:shop",
        "bfcl:nosuch.json",
    ],
)
def test_what_is_no_dataset_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"nosuch|worlds:shop|'shop'"):
        load_tasks(name)


def test_a_policy_plays_a_dialogue_with_the_worlds_own_tools():
    (task,) = load_tasks("worlds:travel/easy:1")
    script = task.make_env(CONFIG)
    script.reset()
    for tell_tools in (False, True):
        engine = ScriptedEngine(list(script.scenario.demonstration))
        outcome = play(
            Policy(
                engine,
                CHAT,
                Limits(max_context=50_000, max_new_tokens=400, episode_seconds=30.0),
                CONFIG,
                tell_tools=tell_tools,
            ),
            task,
        )
        assert (outcome.reward, outcome.ending, outcome.turns) == (
            1.0,
            "success",
            len(script.scenario.demonstration),
        )
        told = CHAT.tokenizer.decode(engine.requests[0][0])
        assert (
            ('"find_traveller"' in told) is tell_tools
            and ("by means of tools" in told) is tell_tools
            and "You are the agent of a travel desk" in told
        )


def as_answer(action):
    """A demonstrator's turn as a chat-completions server gives it."""
    made = parse_tool_calls(action)
    message = {"role": "assistant", "content": None if made else action}
    if made:
        message["tool_calls"] = [
            {
                "id": f"c{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for number, call in enumerate(made)
        ]
    return lambda: web.json_response(
        {"choices": [{"finish_reason": "stop", "message": message}], "usage": {}}
    )


@pytest.mark.parametrize("dataset", ["worlds:gui/medium:1", "problems:math/dice-easy:1", "bfcl"])
def test_an_endpoint_is_told_what_it_plays_and_plays_it_by_http(tmp_path, dataset):
    def later(entry, truth):
        entry.update(missed_function={"1": ["list_products"]})

    (task,) = load_tasks(f"bfcl:{write_bfcl(tmp_path, later)}" if dataset == "bfcl" else dataset)
    script = task.make_env(CONFIG)
    _, info = script.reset()
    turns = (
        [script.demonstrator_action()]
        if dataset.startswith("problems")
        else list(script.scenario.demonstration)
    )
    answers = Answers(*map(as_answer, turns))
    assert http(task, answers).reward == 1.0
    first, last = answers.bodies[0], answers.bodies[-1]
    assert (
        first.get("tools", []) == info["tools"] and first["messages"][0]["content"] == script.system
    )
    named = [[tool["function"]["name"] for tool in body.get("tools", [])] for body in (first, last)]
    assert ["list_products" in names for names in named] == (
        [False, True] if dataset == "bfcl" else [False, False]
    )
