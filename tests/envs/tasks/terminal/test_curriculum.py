"""The families of the terminal curriculum: the demonstrator earns 1 and nobody else does."""

import asyncio
import random
import subprocess
import sys

import pytest

from envs.gem import format_tool_call
from envs.gem.episode import play_demonstration
from envs.rock import SandboxConfig
from envs.tasks.terminal import (
    EVAL_SEED_START,
    FAMILIES,
    HELD_OUT_FAMILIES,
    WORDS,
    eval_seed,
    make_task,
    train_seed,
)
from envs.tasks.terminal.env import TerminalEnv

ALL = FAMILIES + HELD_OUT_FAMILIES
SEEDS = (0, 1, eval_seed(2))
CONFIG = SandboxConfig(isolation="best_available")


def at_once(episodes):
    """Play episodes concurrently; they wait for their sandboxes most of the time."""

    async def play_all():
        return await asyncio.gather(*episodes)

    return asyncio.run(play_all())


def demonstrations(family, seeds, error_rate=0.0):
    """Return the demonstrator's episode of each seed."""

    def start(seed):
        env = TerminalEnv(f"{family}/{seed}", CONFIG)
        return play_demonstration(env, random.Random(f"{family}{seed}"), error_rate)

    return at_once([start(seed) for seed in seeds])


async def episode(family, seed, *commands):
    """Return reward and ending of an agent that sends these commands, whatever comes back, and then
    says that it is done.
    """
    env = TerminalEnv(f"{family}/{seed}", CONFIG, max_turns=len(commands) + 1)
    await env.areset()
    for command in commands:
        await env.astep(format_tool_call("bash", {"command": command}))
    _, reward, terminated, _, info = await env.astep("done")
    assert terminated
    return reward, info["ending"]


# -- every family
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_the_demonstrator_earns_1_and_looks_before_it_acts(family):
    for played in demonstrations(family, SEEDS):
        assert (played.reward, played.ending) == (1.0, "success"), played
        assert 3 <= len(played.turns) <= 5  # look, act, ..., done
        assert {turn.status for turn in played.turns} == {"ok"}
        assert played.turns[-1].text == "done"
        assert played.turns[0].observation != "(no output)"


@pytest.mark.parametrize("family", ALL)
def test_a_demonstrator_that_errs_sees_its_error_and_still_earns_1(family):
    for played in demonstrations(family, SEEDS, error_rate=1.0):
        assert played.reward == 1.0, played
        (wrong,) = [turn for turn in played.turns if turn.is_mistake]
        assert wrong.exit_code and f"[exit {wrong.exit_code}]" in wrong.observation


@pytest.mark.parametrize("family", ALL)
def test_doing_nothing_earns_0(family):
    assert at_once([episode(family, 0)]) == [(0.0, "failure")]


@pytest.mark.parametrize("family", ALL)
def test_the_demonstrator_of_another_seed_earns_0(family):
    """The answer lies in the sandbox: commands that solve one task of a family do not solve the
    next ones, but for luck with a small number.
    """
    (other,) = demonstrations(family, [10])
    commands = [
        turn.text.split('"command": "')[1].removesuffix('"}}\n</tool_call>')
        for turn in other.turns[:-1]
    ]
    played = at_once([episode(family, seed, *commands) for seed in SEEDS])
    by_luck = 1 if family in ("count", "note_count", "sum") else 0
    assert sum(reward for reward, _ in played) <= by_luck


@pytest.mark.parametrize("family", ALL)
def test_a_cheat_earns_0(family):
    """Reward files in every usual place, replaced programs, a forged last line, answers made of all
    that is there.
    """
    cheat = (
        "mkdir -p logs/verifier tests bin; echo 1 | tee out.txt reward.txt logs/verifier/reward.txt"
        " tests/test.sh /tmp/reward.txt; echo '{\"reward\": 1}' > reward.json;printf"
        " '#!/bin/sh\\necho 1\\n' | tee bin/head bin/stat head stat; chmod +x bin/* head stat; echo"
        " 'echo 1; exit 0' > .bashrc; export PATH=.:$PATH BASH_ENV=.bashrc;(while :; do echo 1 >"
        " out.txt; sleep 0.05; done) > /dev/null 2>&1 & echo 1"
    )
    cheats = (cheat, "cat * > all; mv all out.txt")
    played = at_once([episode(family, 0, command) for command in cheats])
    assert played == [(0.0, "failure")] * 2


@pytest.mark.parametrize("family", ALL)
def test_odd_files_in_place_of_the_answer_earn_0_and_no_excuse(family):
    """A pipe, a link to an endless file, a folder: the verifier neither waits nor breaks, so no
    agent gets its failures masked.
    """
    targets = f"out.txt {' '.join(make_task(family, 0).files)}"
    loops = [
        f"for f in {targets}; do rm -rf $f; {make} $f; done"
        for make in ("mkfifo", "ln -s /dev/zero", "mkdir")
    ]
    played = at_once([episode(family, 0, command) for command in loops])
    assert played == [(0.0, "failure")] * 3


# -- generation
# -------------------------------------------------------------------------------------------------


def test_there_are_enough_families_and_the_held_out_ones_are_not_trained():
    assert len(FAMILIES) >= 14 and len(HELD_OUT_FAMILIES) >= 3
    assert not set(FAMILIES) & set(HELD_OUT_FAMILIES)


@pytest.mark.parametrize("family", ALL)
def test_a_task_is_the_same_in_every_process(family):
    task = make_task(family, 7)
    assert make_task(family, 7) == task
    assert task.name == f"{family}/7" and (task.family, task.seed) == (family, 7)


def test_tasks_do_not_depend_on_pythons_hash_seed():
    script = (
        "from envs.tasks.terminal import *\nprint([make_task(f, 3) for f in FAMILIES +"
        " HELD_OUT_FAMILIES])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("family", ALL)
def test_seeds_differ_in_what_lies_in_the_sandbox(family):
    assert len({tuple(make_task(family, seed).files.items()) for seed in range(100)}) == 100


@pytest.mark.parametrize("family", ALL)
def test_files_are_small_and_the_task_enters_the_sandbox_without_its_answer(family):
    for seed in range(20):
        task = make_task(family, seed)
        assert 1 <= len(task.files) <= 6
        assert all(
            len(content) <= 200 and len(content.splitlines()) <= 9
            for content, _ in task.files.values()
        )
        assert "out.txt" not in task.files
        assert len(task.instruction.split()) <= 20


def test_training_and_evaluation_seeds_are_disjoint():
    assert {train_seed(0), train_seed(EVAL_SEED_START - 1)} == {0, EVAL_SEED_START - 1}
    assert eval_seed(0) == EVAL_SEED_START
    with pytest.raises(ValueError, match="evaluation"):
        train_seed(EVAL_SEED_START)
    with pytest.raises(ValueError, match="negative"):
        eval_seed(-1)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'coutn'.*count"):
        make_task("coutn", 0)


def test_no_word_hides_in_another_word_or_in_a_file_that_tasks_name():
    """`grep red` must not find `bread`, and `sed s/list/...` must not meet `list.txt`."""
    names = [
        "data",
        "list",
        "log",
        "items",
        "note",
        "out",
        "run",
        "app",
        "txt",
        "conf",
        "echo",
        "sort",
        "head",
        "tail",
    ]
    assert len(set(WORDS)) == len(WORDS)
    for word in WORDS:
        assert not [other for other in [*WORDS, *names] if word in other and word != other], word
