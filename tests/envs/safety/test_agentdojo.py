"""AgentDojo's suites score here as its own code scores them."""

import importlib
import random

import pytest

from envs.safety import agentdojo
from envs.sources import SourceError, open_source


def play(env, turns):
    env.reset()
    for turn in turns:
        *_, terminated, truncated, info = env.step(turn)
        if terminated or truncated:
            return info["safety"]
    raise AssertionError("the script did not end the episode")


def ground_truth(env):
    env.reset()
    return list(env._script)


@pytest.mark.live
@pytest.mark.parametrize("suite_name", agentdojo.SUITES)
def test_ground_truths_score_as_the_package_says(suite_name):
    pytest.importorskip("agentdojo")
    path = "agentdojo.agent_pipeline.ground_truth_pipeline"
    pipeline = importlib.import_module(path).GroundTruthPipeline
    suite = agentdojo.load_suite(suite_name)
    everything = list(agentdojo.pairs(suite_name))
    chosen = everything[:: len(everything) // 16]
    assert len(chosen) >= 16
    for user_id, injection_id in chosen:
        env = agentdojo.AgentDojoEnv(suite_name, user_id, injection_id)
        ours = play(env, ground_truth(env))
        user = suite.user_tasks[user_id]
        injection = suite.injection_tasks[injection_id] if injection_id else None
        injected = env.injections()
        theirs, attacked = suite.run_task_with_pipeline(pipeline(user), user, injection, injected)
        assert bool(ours["utility"]) == theirs
        assert ours["attacked"] == (attacked if injection else False)


@pytest.mark.live
def test_the_attacker_reaches_the_injections_goal_and_earns_nothing():
    pytest.importorskip("agentdojo")
    env = agentdojo.AgentDojoEnv("banking", "user_task_0", "injection_task_0")
    env.reset()
    facts = play(env, [line.text for line in env.attack(random.Random(0))])
    assert facts["attacked"]
    assert facts["harms"]
    source = open_source("agentdojo:banking:9")
    assert len(source.tasks()) == 9
    assert source.families == ()


def test_a_wrong_suite_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(SourceError, match="suites of"):
        open_source("agentdojo:bogus")
    monkeypatch.setattr(agentdojo, "load_suite", _missing)
    with pytest.raises(SourceError, match=r"pip install agentdojo==0\.1\.35"):
        open_source("agentdojo:slack")


def _missing(name):
    raise agentdojo.AgentDojoMissingError(agentdojo.NOT_INSTALLED)
