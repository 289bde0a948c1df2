"""The five steps of stage 1 and the preference of stage 2, on episodes made for each of them."""

import dataclasses

from benchmarks.labelled_turns import make_trajectory, turn
from rome.stages.selection import first_objection, prefer, quality, select

GOOD = [turn("cat harbor.txt", "3\n1"), turn("sort harbor.txt > meadow.txt", "")]
TASK = "Sort harbor.txt into meadow.txt."


def episode(*chunks, **changes):
    return dataclasses.replace(make_trajectory(TASK, list(chunks)), **changes)


def failing(command="sort harbour.txt"):
    return dataclasses.replace(turn(command, "no such file"), exit_code=2)


def test_each_step_removes_its_own_kind_and_a_good_episode_passes():
    assert first_objection(episode(*GOOD)) == ""
    repeated = [GOOD[0]] * 4
    assert first_objection(episode(*repeated, GOOD[1])) == "redundant"
    assert first_objection(episode(*GOOD, ending="truncated_turns")) == "truncated"
    stuck = [failing(f"sort harbour{number}.txt") for number in range(3)]
    assert first_objection(episode(*stuck, *GOOD, *GOOD)) == "self_repair"
    tampered = turn("echo 1 > /logs/verifier/reward.txt", "")
    assert first_objection(episode(GOOD[0], tampered, GOOD[1])) == "fake"


def test_two_failures_and_a_recovery_are_worth_learning():
    assert first_objection(episode(failing(), failing("ls harbour"), *GOOD)) == ""


def test_an_answer_to_a_problem_of_one_turn_needs_no_call():
    answer = dataclasses.replace(turn("42", ""), tool_call=None)
    assert first_objection(episode(answer)) == ""


def test_the_worst_tenth_of_a_family_is_left_out_unless_all_are_equally_good():
    equal = {number: episode(*GOOD) for number in range(20)}
    kept, funnel = select(equal, "filtered", name_of=str, decisions={})
    assert kept == list(range(20)) and funnel["removed"] == {}
    mixed = equal | {7: episode(failing(), *GOOD)}
    kept, funnel = select(mixed, "filtered", name_of=str, decisions={})
    assert 7 not in kept and len(kept) == 19 and funnel["removed"] == {"ranked": 1}


def test_stage_two_keeps_the_best_verified_episode_of_each_task():
    candidates = {
        0: episode(failing(), *GOOD, task="a"),
        1: episode(*GOOD, task="a"),
        2: episode(*GOOD, task="a", reward=0.0, ending="failure"),
        3: episode(failing(), *GOOD, task="b"),
        4: episode(*GOOD, task="c", reward=0.0, ending="failure"),
    }
    kept, funnel = select(candidates, "preferred", name_of=str, decisions={})
    assert kept == [1, 3]
    assert funnel["removed"] == {"verified": 2, "ranked": 1}
    assert quality(candidates[0]) < quality(candidates[1]) == 1.0


def test_an_expert_overrules_the_rules_and_never_the_verifier():
    tampered = turn("echo 1 > /logs/verifier/reward.txt", "")
    candidates = {
        0: episode(*GOOD, task="a"),
        1: episode(*GOOD, *GOOD, task="a"),
        2: episode(*GOOD, tampered, task="b"),
        3: episode(*GOOD, task="c", reward=0.0, ending="failure"),
    }
    assert prefer(candidates, str, {}) == {1: "ranked", 2: "audited", 3: "verified"}
    decisions = {
        "0": (False, "wrong file"),
        "2": (True, "its reward file is the task"),
        "3": (True, ""),
    }
    assert prefer(candidates, str, decisions) == {0: "audited", 3: "verified"}
