"""A balanced set: rounds go on until each domain has its tasks, and a killed one goes on."""

import asyncio
import json

import pytest

from envs.rock import SandboxConfig
from envs.sources import load_tasks
from envs.tasks.made import FAMILIES, write_draft
from rome.data.seeds import derive_seed
from rome.files import write_atomically
from rome.synth import rounds
from rome.synth.build import Built, drafts_text
from rome.synth.review import find_duplicates


@pytest.mark.slow
def test_rounds_go_on_until_each_domain_has_its_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "SPARE", 0.0)  # one draft a round: one round is not enough
    config = SandboxConfig(isolation="best_available")

    def make():
        job = rounds.make_balanced_set(
            tmp_path,
            config,
            seed=3,
            per_domain=2,
            families=("text", "logs"),
            mutants=4,
            oracle_runs=1,
        )
        return asyncio.run(job)

    counts = make()
    names = sorted(task.name for task in load_tasks(str(tmp_path / "tasks")))
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["accepted"] == sum(counts.values()) == len(set(names)) == len(names)
    assert len(card["rounds"]) >= 2 and counts == {"text": 2, "logs": 2}
    assert make() == counts  # all is in the traces: nothing is played again
    assert sorted(task.name for task in load_tasks(str(tmp_path / "tasks"))) == names


def test_a_task_of_a_later_round_that_repeats_one_is_left_out(tmp_path):
    """Rounds draw other seeds, and a generator makes nearly the same task from some of them."""
    seeds = [
        derive_seed(derive_seed(0, "round", number), "apis", one)
        for number in (1, 2)
        for one in range(20)
    ]
    drafts = [FAMILIES["apis"].make(seed) for seed in seeds]
    again, first = next(pair for pair in find_duplicates(drafts).items() if pair[0] >= 20 > pair[1])
    chosen, known = {drafts[0].domain: []}, []
    for name, number in (("round-1", first), ("round-2", again)):
        folder = tmp_path / name
        (folder / "tasks").mkdir(parents=True)
        (folder / "drafts").mkdir()
        write_draft(drafts[number], folder / "tasks" / drafts[number].name.replace("/", "-"))
        write_atomically(folder / "drafts" / "a.json", drafts_text(Built([drafts[number]])))
        rounds._choose(folder, chosen, known, 25)
    assert len(chosen[drafts[0].domain]) == len(known) == 1
