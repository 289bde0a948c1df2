"""One grammar: what is trained on is never evaluated, and a name makes its task again."""

import asyncio
import dataclasses
import pathlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem.episode import ENDINGS, STATUSES, EnvironmentFault, PlayedEnv, play_demonstration
from envs.rock import SandboxConfig
from envs.sources import (
    Finite,
    Settings,
    SourceError,
    load_tasks,
    open_source,
    overlap,
)
from envs.sources.task import Content, Task
from rome.data import trajectory
from tests.rome.evals.tasks import write_task

OWN = "tests.envs.sources.own"
GENERATED = (
    "terminal",
    "terminal:wide",
    "worlds:shop",
    "games:wordle,frozen_lake",
    "problems:math",
)
MIXTURE = "0.7*terminal + 0.3*worlds:shop/easy"


def made(name, content, family="f"):
    """A task of this content."""
    return Task(
        name=name,
        family=family,
        domain="d",
        difficulty="easy",
        cluster=name,
        start_seconds=1.0,
        play_seconds=1.0,
        grading_seconds=0.0,
        max_turns=1,
        has_demonstrator=False,
        new_env=lambda config: None,
        read=lambda: Content((content,), content, [content.encode()]),
    )


def trained(source, tries=200):
    rng = random.Random(0)
    return [source.train(rng.choice(source.families), rng.randrange(10**6)) for _ in range(tries)]


@pytest.mark.parametrize("spec", [*GENERATED, MIXTURE, f"{OWN}:Countdown"])
@pytest.mark.parametrize("seed", [0, 3])
def test_generated_tasks_of_training_are_none_of_an_evaluation(spec, seed):
    source = open_source(spec, seed=seed)
    names = {task.name for task in trained(source)}
    evaluated = {task.name for task in (*source.evaluation(5), *source.tasks())}
    assert names and evaluated and not names & evaluated
    assert not {task.name for task in open_source(spec, seed=seed + 1).evaluation(5)} & {
        task.name for task in source.evaluation(5)
    }


@given(
    contents=st.lists(st.integers(0, 60).map(str), min_size=1, max_size=80),
    share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_the_parts_of_a_finite_set_never_meet_and_do_not_depend_on_the_others(contents, share):
    """Copies under other names fall on the same side, and so does a task whose set has grown."""
    tasks = [made(f"t{number}", content, content[0]) for number, content in enumerate(contents)]
    source = Finite("set", tasks, share)
    sides = [source.finite(is_trained=True), source.finite(is_trained=False)]
    training, evaluation = ({task.content.opening for task in side} for side in sides)
    assert not training & evaluation and training | evaluation == set(contents)
    assert sum(map(len, sides)) == len(tasks)
    half = Finite("half", tasks[: len(tasks) // 2 + 1], share)
    assert {task.content.opening for task in half.finite(is_trained=True)} <= training
    drawn = {
        source.train(family, index).content.opening
        for family in source.families
        for index in range(100)
    }
    assert drawn == training
    assert {task.content.opening for task in source.evaluation(100)} == evaluation


@pytest.mark.parametrize("spec", [*GENERATED, MIXTURE, "harbor", f"{OWN}:Countdown"])
def test_a_name_makes_its_task_again(spec):
    source = open_source(spec)
    for task in [*source.evaluation(1)[:5], *trained(source, 5), *source.tasks()[:5]]:
        again = open_source(spec).task(task.name)
        assert (again, again.digest()) == (task, task.digest())
    with pytest.raises(SourceError, match="nosuch"):
        source.task("nosuch")


def test_a_mixture_shares_out_what_its_sources_have():
    source = open_source("3*terminal:count,sum + 1*games:wordle+ 1*games:frozen_lake")
    assert [share.weight for share in source.shares] == [0.6, 0.2, 0.2]
    assert source.shares[0].families == ("terminal:count,sum#count", "terminal:count,sum#sum")
    assert [task.family for task in source.evaluation(1)] == list(source.families)
    assert {task.source for task in source.evaluation(1)} == {
        "terminal:count,sum",
        "games:wordle",
        "games:frozen_lake",
    }
    assert open_source("1*terminal").spec == "terminal"


FEW = (
    "problems:math/grid_paths"  # a family with fewer instances than an evaluation and 64 seeds draw
)


@pytest.mark.parametrize("spec", [FEW, f"0.5*{FEW} + 0.5*terminal:count"])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_instance_that_is_evaluated_is_not_trained_on_under_another_seed(spec, seed):
    source = open_source(spec, seed=seed)
    evaluated = source.instances(18)
    family = next(name for name in source.families if "grid_paths" in name)

    def met(*instances):
        tasks = [source.train(family, index, *instances) for index in range(300)]
        return [task.name for task in tasks if task.content_digest() in evaluated]

    assert met() and not met(evaluated)


@pytest.mark.long
def test_a_family_of_which_all_is_evaluated_is_trained_on_and_others_keep_their_draws():
    source = open_source(FEW, seed=0)
    (family, *_) = source.families
    tasks = [source.train(family, index) for index in range(200)]
    everything = frozenset(task.content_digest() for task in tasks)
    assert source.train(family, 5, everything).name == tasks[5].name
    free = [task for task in tasks if task.content_digest() not in source.instances(18)]
    for task in free:
        index = tasks.index(task)
        assert source.train(family, index, source.instances(18)).name == task.name


def test_instances_that_cannot_be_compared_are_told_apart_by_seed_alone():
    source = open_source(f"{OWN}:Countdown")
    assert source.instances(18) == frozenset()
    hidden = open_source("games:wordle")  # the word is not in its first observation
    assert hidden.instances(18) == frozenset()
    task = source.train("Countdown", 5)
    assert source.train("Countdown", 5, frozenset([task.content_digest()])).name == task.name


def test_a_count_bounds_what_is_trained_on_and_evaluated():
    source = open_source("terminal:count,sum,find:4")
    names = {task.name for task in trained(source)}
    assert names == {"count/0", "count/1", "sum/0", "find/0"}
    assert len(source.evaluation(9)) == 4 and len(source.tasks()) == 4


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere", "0.7\\*A"),
        ("worlds:nosuch", "known: gui"),
        ("0.5*terminal + games", "WEIGHT"),
        ("0*terminal + 1*games", "WEIGHT"),
        ("1*terminal + 2*terminal", "twice"),
        ("gem:nosuch", "nosuch"),
        ("no.such.module:Name", "no.such|'no'"),
        (f"{OWN}:Missing", "Missing"),
        (f"{OWN}:Endless", "max_turns"),
        (f"{OWN}:NO_CLASS", "no class"),
        (f"{OWN}:nothing", "no reset"),
        (f"{OWN}:fails", "no board is left"),
        ("no/such/file.py:Name", "no file"),
        ("", "grammar|one of"),
        ("games:sokoban,", "nothing named ''"),
        ("worlds:shop,,gui", "nothing named ''"),
        (f"{'9' * 400}*terminal + 1*games", "WEIGHT"),
        (f"{'9' * 300}*terminal + .{'0' * 300}1*games", "WEIGHT"),
        ("x" * 300, "neither a folder"),
    ],
)
def test_what_is_no_source_is_refused_and_says_why(spec, says):
    with pytest.raises(SourceError, match=says):
        open_source(spec)


def test_a_folder_sets_broken_tasks_aside(tmp_path):
    write_task(tmp_path, "good")
    write_task(tmp_path, "bad", task_toml="version = \n")
    faults = []
    source = open_source(str(tmp_path), faults=faults, eval_share=0.0)
    assert [task.name for task in source.tasks()] == ["good"] and "bad" in str(faults[0])
    assert source.train("files", 5).name == "good"


def test_copies_of_a_task_folder_are_one_task_and_an_overlap_is_found(tmp_path):
    for folder, name in (("a", "one"), ("b", "other")):
        write_task(tmp_path / folder, name)
    write_task(tmp_path / "b", "third", instruction="Write hello into /app/out.txt, please.\n")
    train = open_source(str(tmp_path / "a"), eval_share=0.0)
    evaluation = open_source(str(tmp_path / "b"), eval_share=1.0)
    assert overlap(train, evaluation) == ["other"]
    assert overlap(open_source("terminal"), open_source("terminal")) == []


# -- environments of others
# -------------------------------------------------------------------------------------------------


async def said(task, *actions):
    """Return the turns of an episode."""
    played = PlayedEnv(task.make_env(SandboxConfig()), 60.0, 60.0)
    opening, _ = await played.start()
    turns = [await played.step(action) for action in actions]
    return opening, turns, played.reward


def test_an_environment_with_two_methods_is_played_to_its_end():
    task = open_source(f"{OWN}:Countdown").train("Countdown", 5)
    opening, _, _ = asyncio.run(said(task))
    numbers = [str(number) for number in range(int(opening[-2]), 0, -1)]
    _, turns, reward = asyncio.run(said(task, *numbers))
    assert (turns[-1].ending, reward) == ("success", 1.0)
    _, turns, _ = asyncio.run(said(task, "x"))
    assert turns[-1].ending == "failure"
    assert task.content.opening == opening and task.name == "Countdown/5"


def test_a_limit_of_turns_ends_what_has_none():
    source = open_source(f"{OWN}:Endless", settings=Settings(max_turns=3))
    _, turns, reward = asyncio.run(said(source.train("Endless", 0), "a", "b", "c"))
    assert [turn.ending for turn in turns] == ["", "", "truncated_turns"] and reward == 0.75


def test_an_error_of_an_environment_is_not_the_agents():
    task = open_source(f"{OWN}:Broken").train("Broken", 0)
    with pytest.raises(EnvironmentFault, match=r"Broken.step raised KeyError: 'board'"):
        asyncio.run(said(task, "1"))


def test_a_script_of_another_package_is_played():
    task = open_source(f"{OWN}:Shown").train("Shown", 1)
    assert task.has_demonstrator
    episode = asyncio.run(play_demonstration(task.make_env(SandboxConfig()), random.Random(0)))
    assert (episode.ending, episode.reward) == ("success", 1.0)


def test_an_environment_of_gymnasium_is_wrapped():
    task = open_source(f"{OWN}:frozen_lake").train("frozen_lake", 1)
    assert task.max_turns == 100
    way = ["<answer>1</answer>"] * 2 + ["<answer>2</answer>", "<answer>1</answer>"]
    way += ["<answer>2</answer>"] * 2
    _, turns, reward = asyncio.run(said(task, *way))
    assert (turns[-1].ending, reward) == ("success", 1.0)


def test_a_file_is_found_beside_the_experiment(tmp_path):
    source = pathlib.Path(__file__).with_name("own.py").read_text()
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "mine_module_of_test.py").write_text(source)
    there = Settings(folders=(str(tmp_path),))
    for spec in ("mine.py:Countdown", "mine_module_of_test:Countdown"):
        assert open_source(spec, settings=there).families == ("Countdown",)
        with pytest.raises(SourceError):
            open_source(spec.replace("mine", "other"), settings=there)


def test_registered_environments_are_played_alike_under_both_names():
    one, other = load_tasks("gem:rome:shop/hard"), load_tasks("worlds:shop/hard")
    assert [dataclasses.replace(task, name="") for task in one] == [
        dataclasses.replace(task, name="") for task in other
    ]


def test_endings_are_those_of_trajectories():
    assert (ENDINGS, STATUSES) == (trajectory.ENDINGS, trajectory.STATUSES)
