"""A balanced set: rounds go on until each domain has its tasks, and a killed one goes on."""

import asyncio
import json

import pytest

from envs.rock import SandboxConfig
from envs.sources import load_tasks
from rome.synth import rounds


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
