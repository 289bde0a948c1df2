"""Worlds, problems, games and published files as datasets: named, spread, evaluated by the same agents and proven by the same proof."""

import asyncio
import json

import pytest

from envs.gem import format_tool_call
from rome.agent.loop import Limits
from rome.evals.agents import Policy, Scripted
from rome.evals.cheats import CHEATS
from rome.evals.tasks import dataset_digest, load_tasks
from rome.evals.validate import judge
from tests.envs.worlds.test_published import write_bfcl, write_tau2
from tests.rome.evals.tasks import CONFIG
from tests.rome.rollout.worlds import CHAT, ScriptedEngine


def play(agent, task, attempt=0):
    return asyncio.run(agent.play(task, attempt, seed=1))


def proof_of(task):
    records = []
    for name, attempts in (("oracle", 1), ("noop", 1), ("cheat", len(CHEATS))):
        for attempt in range(attempts):
            outcome = play(Scripted(name, CONFIG), task, attempt)
            records.append({"agent": name, "attempt": attempt, "reward": outcome.reward, "ending": outcome.ending, "note": outcome.note, "seconds": 0.0})
    return judge(task.name, records)


@pytest.mark.parametrize("dataset", ["worlds", "problems:math:14", "problems:code/postfix-easy", "games"])
def test_generated_datasets_are_sound(dataset):
    tasks = load_tasks(dataset)
    assert tasks and [proof_of(task)["reasons"] for task in tasks] == [[] for _ in tasks]


def test_published_files_are_sound(tmp_path):
    domain, _ = write_tau2(tmp_path)
    for dataset, name in ((f"bfcl:{write_bfcl(tmp_path)}", "multi_turn_base_0"), (f"tau2:{domain}", "shop/0")):
        (task,) = load_tasks(dataset)
        assert task.name == name and proof_of(task)["reasons"] == []


def test_instances_are_spread_and_chosen_by_the_seed():
    tasks = load_tasks("worlds:shop/hard,gui:8")
    assert {task.name.rsplit("/", 1)[0] for task in tasks} == {"shop/hard", "gui/easy", "gui/medium", "gui/hard"} and len({task.name for task in tasks}) == 8
    assert {(task.domain, task.difficulty) for task in tasks} == {("shop", "hard"), ("gui", "easy"), ("gui", "medium"), ("gui", "hard")}
    assert dataset_digest(load_tasks("worlds:travel:6")) == dataset_digest(load_tasks("worlds:travel:6"))
    assert not {task.name for task in load_tasks("worlds:travel:6")} & {task.name for task in load_tasks("worlds:travel:6", seed=1)}
    assert "policy" not in tasks[0].instruction.lower()  # which many tasks share, and no corpus is contaminated by


@pytest.mark.parametrize("name", ["worlds:nosuch", "worlds:shop:0", "worlds:shop:x", "problems:math/nosuch", "games:shop", "bfcl:nosuch.json", "tau2:nosuch"])
def test_what_is_no_dataset_is_refused_by_name(name):
    with pytest.raises(ValueError, match="nosuch|worlds:shop|'shop'"):
        load_tasks(name)


def test_a_policy_plays_a_dialogue_with_the_worlds_own_tools():
    (task,) = load_tasks("worlds:travel/easy:1")
    script = task.make_env(CONFIG)
    script.reset()
    for tell_tools in (False, True):
        engine = ScriptedEngine(list(script.scenario.expert))
        outcome = play(Policy(engine, CHAT, Limits(max_context=50_000, max_new_tokens=400, episode_seconds=30.0), CONFIG, tell_tools=tell_tools), task)
        assert (outcome.reward, outcome.ending, outcome.turns) == (1.0, "success", len(script.scenario.expert))
        told = CHAT.tokenizer.decode(engine.requests[0][0])
        assert ('"find_traveller"' in told) is tell_tools and ("by means of tools" in told) is tell_tools and "You are the agent of a travel desk" in told


def test_an_endpoint_is_told_what_it_plays(monkeypatch):
    """The bodies that the endpoint gets: the world's tools, its own system text, none of either for a problem without tools."""
    from rome.evals.endpoint import Endpoint

    bodies = []

    async def answer(self, body):
        bodies.append(body)
        return 200, {}, json.dumps({"choices": [{"message": {"content": "done"}, "finish_reason": "stop"}]})

    monkeypatch.setattr(Endpoint, "_post", answer)
    for dataset in ("worlds:gui/easy:1", "problems:math/dice-easy:1"):
        (task,) = load_tasks(dataset)
        assert play(Endpoint("http://127.0.0.1:1/v1", "m", CONFIG), task).reward == 0.0
    first, second = bodies[0], bodies[-1]
    assert {tool["function"]["name"] for tool in first["tools"]} == {"look", "click", "type", "select", "submit"} and "by means of tools" in first["messages"][0]["content"]
    assert "tools" not in second and "\\boxed{}" in second["messages"][0]["content"]


def test_a_tool_call_of_an_endpoint_reaches_the_world():
    (task,) = load_tasks("worlds:shop/easy:1")
    env = task.make_env(CONFIG)
    env.reset()
    assert env.step(format_tool_call("list_products", {}))[4]["status"] == "ok"
