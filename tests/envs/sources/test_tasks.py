"""A dataset's name gives the same tasks each time, spread evenly; other names are refused."""

import collections

import pytest

from envs.sources import dataset_digest, load_tasks
from envs.tasks.harbor import EXAMPLES, TaskError
from envs.tasks.terminal import EVAL_SEED_START, WIDE_FAMILIES
from tests.rome.evals.tasks import write_task


def test_instances_are_spread_over_families_and_are_no_training_seeds():
    tasks = load_tasks("terminal:wide:150")
    counts = collections.Counter(task.family for task in tasks)
    assert set(counts) == set(WIDE_FAMILIES) and max(counts.values()) - min(counts.values()) <= 1
    assert len({task.name for task in tasks}) == 150 and all(
        int(task.name.rpartition("/")[2]) >= EVAL_SEED_START for task in tasks
    )
    assert {task.domain for task in tasks} == {
        "files",
        "text",
        "data",
        "debugging",
        "system",
        "software",
    }


def test_the_same_name_and_seed_give_the_same_tasks_and_another_seed_others():
    assert dataset_digest(load_tasks("terminal:count,sum:4")) == dataset_digest(
        load_tasks("terminal:count,sum:4")
    )
    assert not {task.name for task in load_tasks("terminal:count:4", seed=0)} & {
        task.name for task in load_tasks("terminal:count:4", seed=1)
    }


def test_the_shipped_examples_are_known_by_name():
    names = sorted(task.name.rpartition("/")[2] for task in load_tasks("harbor"))
    assert names == sorted(folder.name for folder in EXAMPLES.iterdir())
    (one,) = load_tasks("harbor/word-report")
    assert (one.name, one.domain, one.difficulty) == ("word-report", "text", "easy")


@pytest.mark.parametrize(
    "name",
    [
        "terminal:nosuch",
        "terminal:count:0",
        "terminal:count:x",
        "terminal:count:1:2",
        "terminal:count:-1",
        "nowhere",
        "harbor/nosuch",
    ],
)
def test_what_is_no_dataset_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"nosuch|terminal:count|nowhere|harbor/nosuch"):
        load_tasks(name)


def test_any_changed_file_makes_another_dataset(tmp_path):
    write_task(tmp_path, "a")
    before = dataset_digest(load_tasks(str(tmp_path)))
    assert dataset_digest(load_tasks(str(tmp_path))) == before
    write_task(tmp_path, "a", test="#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n")
    assert dataset_digest(load_tasks(str(tmp_path))) != before


def test_a_malformed_task_is_raised_or_listed_with_its_line(tmp_path):
    write_task(tmp_path, "good")
    write_task(tmp_path, "bad", task_toml='version = "1.0"\nversion = \n')
    with pytest.raises(TaskError, match=r"task.toml:2"):
        load_tasks(str(tmp_path))
    faults = []
    assert [task.name for task in load_tasks(str(tmp_path), faults=faults)] == ["good"] and len(
        faults
    ) == 1
