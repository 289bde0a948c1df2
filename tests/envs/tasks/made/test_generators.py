"""Generators: the same seed gives the same task, and another seed another one."""

import collections
import itertools
import json

import pytest

from envs.tasks.harbor import load_task
from envs.tasks.made import FAMILIES, files_of, write_draft
from envs.tasks.made.mutate_text import mutants_of
from envs.tasks.made.pro import INDEX, read_index
from envs.tasks.made.prove import choose_mutants, fakes_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_decides_the_whole_task(family):
    first, again = (FAMILIES[family].make(17) for _ in range(2))
    assert first == again and files_of(first) == files_of(again)
    digests = [FAMILIES[family].make(seed).digest for seed in range(12)]
    assert len(set(digests)) == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_a_harbor_task_with_a_verifier_of_its_own(family, tmp_path):
    draft = FAMILIES[family].make(3)
    write_draft(draft, tmp_path / "task")
    task = load_task(tmp_path / "task")
    (step,) = task.steps
    assert task.name == draft.name and task.category == draft.domain and not task.unknown_keys
    assert step.verifier_environment is not None
    assert step.artifacts == (f"/app/{draft.program}",)
    assert "canary" not in step.instruction
    assert draft.canary in (tmp_path / "task" / "instruction.md").read_text()
    assert ":latest" not in task.environment.dockerfile and ":" in task.environment.dockerfile


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_the_agent_sees_holds_a_hidden_case(family):
    draft = FAMILIES[family].make(5)
    seen = draft.instruction + "".join(draft.files.values())
    hidden = [text for case in draft.cases for text in case.files.values() if len(text) > 40]
    shared = {text for text in draft.files.values()}
    assert all(text not in seen for text in hidden if text not in shared)


@pytest.mark.parametrize("family", FAMILIES)
def test_mutants_differ_from_the_oracle_and_from_each_other(family):
    draft = FAMILIES[family].make(8)
    edits = choose_mutants(draft, 10, seed=0)
    texts = [edit.apply(draft.oracle) for edit in edits]
    assert edits == choose_mutants(draft, 10, seed=0)
    assert len({draft.oracle, *texts}) == len(texts) + 1
    assert "empty" in fakes_of(draft)


def test_comments_and_operators_of_another_kind_are_left_alone():
    text = "# sort | uniq 12\nsort -k2nr | head -n3\n"
    for edit in mutants_of(text, "shell"):
        assert edit.start >= len("# sort | uniq 12\n")
    with pytest.raises(ValueError, match="cobol"):
        mutants_of("x", "cobol")


def test_the_answers_of_a_pipeline_depend_on_each_of_its_stages():
    draft = FAMILIES["text"].make(4)
    stages = draft.oracle.splitlines()[1].split(" | ")
    assert len(stages) >= 3
    outcomes = {case.stdout for case in draft.cases}
    assert len(outcomes) > 1


def test_the_store_refuses_what_its_schema_forbids():
    from envs.tasks.made import api_store

    state = json.loads(FAMILIES["apis"].make(0).files["state.json"])
    kinds = list(state["schema"])
    owner, item = kinds[0], kinds[1]
    one = state["records"][item][0]
    stale = {"call": "update", "kind": item, "id": one["id"], "version": 99, "values": {}}
    assert "version" in api_store.handle(state, stale)["error"]
    referred = {"call": "delete", "kind": owner, "id": one[owner]}
    assert "refers" in api_store.handle(state, referred)["error"]
    assert "error" in api_store.handle(state, {"call": "list"})
    pages = itertools.count(0)
    listed, after = [], 0
    while next(pages) < 9:
        page = api_store.handle(state, {"call": "list", "kind": item, "after": after})["ok"]
        listed += page
        after = page[-1]["id"] if page else after
    assert {one["id"] for one in listed} == {one["id"] for one in state["records"][item]}


def test_the_set_pro_has_25_tasks_in_each_of_eight_domains_and_its_generators_still_make_them():
    entries = read_index(INDEX)
    counts = collections.Counter(entry["family"] for entry in entries)
    assert counts == dict.fromkeys(FAMILIES, 25)
    assert len({entry["digest"] for entry in entries}) == 200
    for entry in entries[::9]:
        assert FAMILIES[entry["family"]].make(entry["seed"]).digest == entry["digest"]
