"""The wide families: the demonstrator earns 1; doing nothing, guessing and tampering earn 0."""

import asyncio
import hashlib
import random
import re
import shutil

import pytest

from envs.gem import format_tool_call, make
from envs.gem.episode import play_demonstration
from envs.rock import SandboxConfig
from envs.rock.embedded.sandbox import EmbeddedBackend
from envs.tasks.terminal import (
    DOMAINS,
    FAMILIES,
    FAMILY_TABLE,
    HELD_OUT_FAMILIES,
    WIDE_FAMILIES,
    checks,
    eval_seed,
    make_task,
)
from envs.tasks.terminal.env import MissingProgramsError, TerminalEnv
from envs.tasks.terminal.families.wide.programs import PROGRAMS
from envs.tasks.terminal.registry import wide_family
from envs.tasks.terminal.task import TaskDraft

CONFIG = SandboxConfig(isolation="best_available")
AT_ONCE = 6
HERE = tuple(
    name
    for name in WIDE_FAMILIES
    if all(shutil.which(program, path="/usr/bin:/bin") for program in FAMILY_TABLE[name].programs)
)
RUNS_CODE = tuple(name for name in HERE if make_task(name, 0).runs_agent_code)

GUESSES = (
    "rm -f -- *.ini; mkdir -p logs/verifier tests bin; for f in out.txt out.csv letter.txt"
    " whole.txt table.csv rows.csv reward.txt logs/verifier/reward.txt /tmp/reward.txt; do echo 1 >"
    " $f; done;printf '#!/bin/sh\\necho 1\\n' | tee bin/head bin/git head git python3 tar find stat"
    " > /dev/null; chmod +x bin/* head git python3 tar find stat; cp json.py sys.py 2>"
    " /dev/null;for m in json sys runpy configparser sitecustomize usercustomize; do echo 'import"
    " os; print(1); os._exit(0)' > $m.py; done;printf '[alias]\\nrev-list = !echo"
    " 1\\n[core]\\nfsmonitor = echo 1\\n' > .gitconfig; [ -d .git ] && cat .gitconfig >>"
    " .git/config; echo 'echo 1; exit 0' > .bashrc;export PATH=.:$PATH BASH_ENV=.bashrc; (while :;"
    " do echo 1 > out.txt; sleep 0.05; done) > /dev/null 2>&1 & echo 1"
)
KILLER = (
    "shopt -s globstar nullglob; for f in **/*.py; do echo 'import os; print(1, flush=True);"
    " os.kill(os.getppid(), 9); os.kill(-1, 9)' > $f; done;for f in **/*.sh; do echo 'echo 1; kill"
    " -9 $PPID; kill -9 -1' > $f; done; for f in **/*.js; do echo 'console.log(1);"
    " process.kill(process.ppid, 9)' > $f; done;printf 'echo 1; kill -9 $PPID; kill -9 -1' >"
    " backup.sh; printf '%%:\\n\\tkill -9 -1\\n' > Makefile; echo 'import os; os.kill(os.getppid(),"
    " 9)' > test_it.py; rm -f .git/index"
)


async def _play(name, seed, *commands):
    env = make(f"terminal/{name}", seed=seed, sandbox_config=CONFIG)
    try:
        await env.areset()
        for command in commands:
            await env.astep(format_tool_call("bash", {"command": command}))
        _, reward, _, _, info = await env.astep("done")
        return reward, info["ending"]
    finally:
        await env.aclose()


async def _demonstration(name, seed, error_rate=0.0, config=CONFIG):
    return await play_demonstration(
        make(f"terminal/{name}", sandbox_config=config),
        random.Random(f"{name}/{seed}"),
        error_rate,
        seed=seed,
    )


def at_once(coroutines):
    """Their results, a few running at a time."""

    async def limited(gate, coroutine):
        async with gate:
            return await coroutine

    async def gather():
        gate = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(limited(gate, coroutine) for coroutine in coroutines))

    return asyncio.run(gather())


def _episodes(name, count_only=False):
    """Play a demonstration, no-op and one cheat.

    The cheat is the second, stronger one where a verifier runs programs of the agent's.

    All cheats play in the slow test.
    """
    cheat = KILLER if name in RUNS_CODE else GUESSES
    return (
        range(3)
        if count_only
        else [_demonstration(name, eval_seed(3)), _play(name, 1), _play(name, 2, cheat)]
    )


@pytest.fixture(scope="module")
def played():
    """Family -> what its demonstrator, a no-op and a cheat got; each in a sandbox of its own, all
    concurrently.
    """
    results = iter(at_once([episode for name in HERE for episode in _episodes(name)]))
    return {name: [next(results) for _ in _episodes(name, count_only=True)] for name in HERE}


# -- every family
# -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", HERE)
def test_the_demonstrator_earns_1_and_looks_before_it_acts(played, name):
    episode = played[name][0]
    assert (episode.reward, episode.ending) == (1.0, "success"), episode
    assert {turn.status for turn in episode.turns} == {"ok"}
    assert 3 <= len(episode.turns) <= 8 and episode.turns[0].observation != "(no output)"


@pytest.mark.parametrize("name", HERE)
def test_doing_nothing_earns_0(played, name):
    assert played[name][1] == (0.0, "failure")


@pytest.mark.parametrize("name", HERE)
def test_guessing_replacing_programs_and_killing_the_grader_earn_0_and_are_no_fault_of_the_house(
    played, name
):
    assert played[name][2] == (0.0, "failure")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_cheat_on_several_seeds_of_each_family():
    results = at_once(
        [
            _play(name, seed, cheat)
            for name in HERE
            for seed in range(4)
            for cheat in (GUESSES, KILLER, f"{GUESSES}; {KILLER}")
        ]
    )
    assert [result for result in results if result != (0.0, "failure")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demonstrators_earn_1_in_the_landlock_tier_too():
    """Where there is no /etc to read and no /tmp, as in Colab."""
    weak = SandboxConfig(isolation="best_available", tier="landlock")
    episodes = at_once(
        [_demonstration(name, seed, config=weak) for name in HERE for seed in range(3)]
    )
    assert [episode for episode in episodes if episode.reward != 1.0] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_25_seeds_of_each_family():
    episodes = at_once([_demonstration(name, seed) for name in HERE for seed in range(25)])
    assert [episode.task for episode in episodes if episode.reward != 1.0] == []
    assert [
        result
        for result in at_once([_play(name, seed) for name in HERE for seed in range(25)])
        if result != (0.0, "failure")
    ] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_demonstrator_that_errs_still_earns_1():
    episodes = at_once(
        [_demonstration(name, seed, error_rate=1.0) for name in HERE for seed in range(4)]
    )
    assert [
        episode
        for episode in episodes
        if episode.reward != 1.0 or not any(turn.is_mistake for turn in episode.turns)
    ] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_odd_files_in_place_of_answers_earn_0_and_no_excuse():
    odd = (
        "for f in out.txt out.csv good.csv rows.csv table.csv letter.txt whole.txt current"
        ' backup.sh package.json {}; do rm -rf -- "$f"; mkdir -p "$(dirname -- "$f")"; {} "$f";'
        " done"
    )
    plays = [
        _play(
            name,
            0,
            odd.format(" ".join(f"'./{path}'" for path in make_task(name, 0).files), make_it),
        )
        for name in HERE
        for make_it in ("mkfifo", "ln -s /dev/zero", "mkdir")
    ]
    assert [result for result in at_once(plays) if result != (0.0, "failure")] == []


# -- what the families are
# -------------------------------------------------------------------------------------------------


def test_at_least_40_families_in_6_domains_and_every_difficulty_and_all_are_in_the_table():
    assert set(FAMILY_TABLE) == {*FAMILIES, *HELD_OUT_FAMILIES, *WIDE_FAMILIES}
    assert len(WIDE_FAMILIES) >= 40 and not set(WIDE_FAMILIES) & {*FAMILIES, *HELD_OUT_FAMILIES}
    by_domain = {
        domain: [name for name in WIDE_FAMILIES if FAMILY_TABLE[name].domain == domain]
        for domain in DOMAINS
    }
    assert len(by_domain) == 6 and min(map(len, by_domain.values())) >= 6, by_domain
    assert {info.difficulty for info in FAMILY_TABLE.values()} == {1, 2, 3, 4, 5}


def test_the_tiny_models_curriculum_did_not_change():
    """Checkpoints and figures depend on it, to the byte."""
    digest = hashlib.sha256()
    for name in (*FAMILIES, *HELD_OUT_FAMILIES):
        for seed in [*range(40), *(eval_seed(index) for index in range(10))]:
            task = make_task(name, seed)
            digest.update(
                repr(
                    (task.name, task.family, task.seed, task.instruction, task.files, task.verifier)
                ).encode()
            )
            assert not task.setup and not task.programs and not task.runs_agent_code
    assert digest.hexdigest() == "6aae4f93f4064e06ace2d8553a7bf0812a3f66be997325d717a40b32af86c7e2"
    assert (len(FAMILIES), len(HELD_OUT_FAMILIES)) == (22, 4)


@pytest.mark.parametrize("name", WIDE_FAMILIES)
def test_a_task_is_reproducible_and_seeds_differ(name):
    tasks = [make_task(name, seed) for seed in range(60)]
    assert tasks[7] == make_task(name, 7)
    assert len({(task.instruction, task.setup, tuple(task.files.items())) for task in tasks}) >= 55
    assert all(
        len(task.instruction) <= 400 and sum(len(text) for text, _ in task.files.values()) <= 16_000
        for task in tasks
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_bug_shows_on_the_hidden_inputs_of_every_seed(program):
    def output(source, arguments):
        namespace = {}
        exec(source, namespace)
        try:
            return repr(namespace[program.name](*arguments))
        except (IndexError, TypeError, KeyError) as error:
            return type(error).__name__

    for bug in program.bugs:
        for seed in range(20):
            inputs = program.inputs(random.Random(seed))
            assert any(
                output(program.broken(bug), arguments) != program.expected(arguments)
                for arguments in inputs
            ), (bug, inputs)


def test_a_bug_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="matches 0 times"):
        PROGRAMS[0].broken(("no such text", ""))


# -- programs that a sandbox may lack
# -------------------------------------------------------------------------------------------------


def test_a_family_whose_program_is_missing_is_refused_by_name(monkeypatch):
    real = EmbeddedBackend.execute

    async def without_git(self, command, *args, **kwargs):
        return await real(
            self,
            f'command() {{ [ "$2" != git ] && builtin command "$@"; }}\n{command}',
            *args,
            **kwargs,
        )

    monkeypatch.setattr(EmbeddedBackend, "execute", without_git)

    async def reset(name):
        env = TerminalEnv(f"{name}/3", CONFIG)
        try:
            return await env.areset()
        finally:
            await env.aclose()

    needs_git = r"git_merge/3 needs git in /usr/bin:/bin, which.*'git_merge'"
    with pytest.raises(MissingProgramsError, match=needs_git):
        asyncio.run(reset("git_merge"))
    assert asyncio.run(reset("pivot"))


# what the checks of checks.py run beyond bash, coreutils, grep, sed and find
PROGRAMS_OF_CHECKS = {
    "archive": {"tar", "gzip"},
    "archived": {"tar", "gzip"},
    "json": {"python3"},
    "ini": {"python3"},
    **{name: {"git"} for name in ("committed", "uncommitted", "subjects", "parents", "head_is")},
}


@pytest.mark.parametrize("name", WIDE_FAMILIES)
def test_a_family_declares_every_program_that_its_verifier_runs(name):
    """One that is missing would make a check fail, and the agent's work count as wrong."""
    task = make_task(name, 0)
    body = task.verifier.partition(checks.PRELUDE)[2]
    needed = set()
    for check, programs in PROGRAMS_OF_CHECKS.items():
        if re.search(rf"^{check} ", body, re.MULTILINE):
            needed |= programs
    for program in ("python3", "node", "make", "git"):
        if re.search(rf"/usr/bin/{program}\b", body):
            needed.add(program)
    assert needed <= set(task.programs)


@pytest.mark.parametrize(("domain", "difficulty"), [("games", 3), ("files", 0), ("files", 6)])
def test_a_family_of_no_domain_or_difficulty_is_refused(domain, difficulty):
    with pytest.raises(ValueError, match=f"{domain!r}.*{difficulty}"):
        wide_family("nowhere", domain, difficulty)(
            lambda draw: TaskDraft("", {}, [], lambda: iter(()))
        )
