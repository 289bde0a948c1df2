"""The source `safety`: what its names mean, and that training and evaluation share no family."""

import pytest

from envs.rock import SandboxConfig
from envs.safety import CLEAN, SEEDS, WORLD_SEEDS
from envs.sources import SourceError, open_source, overlap
from envs.tasks.terminal import EVAL_SEED_START

ALL = {**SEEDS, **WORLD_SEEDS}


def seeds_of(tasks):
    return {task.family.removeprefix(CLEAN) for task in tasks}


def test_training_and_evaluation_share_no_seed_family():
    source = open_source("safety")
    trained = {family.removeprefix(CLEAN) for family in source.families}
    assert trained
    for evaluated in (source.tasks(), source.evaluation(2)):
        assert seeds_of(evaluated)
        assert not trained & seeds_of(evaluated)
    assert trained == {name for name, seed in ALL.items() if seed.split == "train"}


def test_training_and_evaluation_share_no_base_task_either():
    source = open_source("safety:readme-mine")
    trained = source.train("readme-mine", 3)
    (evaluated, *_) = source.tasks()
    assert int(evaluated.name.rpartition("/")[2]) >= EVAL_SEED_START
    assert trained.content_digest() != evaluated.content_digest()


@pytest.mark.long
def test_a_base_task_that_is_trained_on_elsewhere_is_found_in_an_evaluation():
    trained = open_source("repair::2", eval_share=0.0)
    same = open_source("safety:all+repair::2", eval_share=1.0)
    assert len(overlap(trained, same)) == 2
    assert overlap(open_source("safety:all+repair::2", eval_share=0.0), same)
    assert not overlap(trained, open_source("safety:all+terminal", eval_share=1.0))
    assert not overlap(trained, open_source("safety", eval_share=1.0))


def test_names_choose_channels_pillars_sorts_and_families():
    assert {ALL[n].channel for n in seeds_of(open_source("safety:tool").tasks())} == {"tool"}
    assert {ALL[n].sort for n in seeds_of(open_source("safety:all,cue").tasks())} == {"cue"}
    assert seeds_of(open_source("safety:all").tasks()) == set(ALL)
    assert len(open_source("safety:repository:5").tasks()) == 5
    families = [task.family for task in open_source("safety:all,readme-mine").tasks()]
    assert families == ["readme-mine", f"{CLEAN}readme-mine"]


def test_a_base_is_any_source_and_decides_which_seeds_fit():
    worlds = open_source("safety:all+worlds:shop")
    assert seeds_of(worlds.tasks()) == set(WORLD_SEEDS)
    wide = open_source("safety:all,readme-mine+terminal:wide")
    assert wide.tasks()[0].make_env(SandboxConfig()).env.task.family
    mixed = open_source("0.5*safety:repository+terminal:wide + 0.5*terminal")
    assert any("safety" in family for family in mixed.families)


def test_a_name_makes_the_task_again():
    source = open_source("safety")
    for task in source.tasks()[::9]:
        again = open_source("safety").task(task.name)
        assert again.digest() == task.digest()


def test_a_clean_twin_has_the_base_task_of_its_attack():
    source = open_source("safety:all,issue-tunnel")
    attack, clean = source.tasks()
    assert attack.instruction.splitlines()[0] == clean.instruction.splitlines()[0]
    assert attack.has_attack
    assert attack.cluster == clean.cluster


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("safety:bogus", "nothing named 'bogus'"),
        ("safety:1:2:3", r"is not safety\[:NAMES"),
        ("safety+", r"is not safety\[:NAMES"),
        ("safety:all:0", "no number of tasks"),
        ("safety:cue+worlds:shop", "add train or all"),
        ("safety:stop+worlds:shop", "no seed that it names fits"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(SourceError, match=message):
        open_source(spec)


def test_an_ungated_source_is_part_of_a_mixture():
    source = open_source("0.5*terminal + 0.5*safety:ungated")
    family = next(name for name in source.families if "readme-mine" in name)
    task = source.train(family, 4)
    assert source.task(task.name).digest() == task.digest()
    assert not task.make_env(SandboxConfig()).is_gated
    assert open_source("safety").tasks()[0].make_env(SandboxConfig()).is_gated
