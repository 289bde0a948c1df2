"""A proof fails for each kind of unsound task, and says which."""

import asyncio
import json

from envs.sources import load_tasks
from rome.evals.cheats import CHEATS
from rome.evals.runner import open_results, run_jobs
from rome.evals.validate import build_proof, judge, proof_jobs, write_proof
from tests.rome.evals.tasks import CONFIG, write_task

PAYS_FOR_NOTHING = (
    "#!/bin/bash\nif [ -e /app/out.txt ]; then echo 0; else echo 1; fi >"
    " /logs/verifier/reward.txt\n"
)
PAYS_FOR_A_FILE = (
    '#!/bin/bash\nif [ -e /app/reward.txt ] || [ "$(cat /app/out.txt)" = hello ]; then echo 1; else'
    " echo 0; fi > /logs/verifier/reward.txt\n"
)


def record(agent, attempt, reward, ending="failure"):
    return {
        "agent": agent,
        "attempt": attempt,
        "reward": reward,
        "ending": ending,
        "note": "",
        "seconds": attempt + 1.0,
    }


def test_each_unsound_task_is_found_for_its_own_reason(tmp_path):
    folder = tmp_path / "tasks"
    write_task(folder, "sound")
    write_task(folder, "upside-down", test=PAYS_FOR_NOTHING)
    write_task(folder, "pays-cheats", test=PAYS_FOR_A_FILE)
    write_task(folder, "malformed", task_toml="[agent\n")
    faults = []
    tasks = load_tasks(str(folder), faults=faults)
    jobs = proof_jobs(tasks, CONFIG, oracle_runs=1)
    assert len(jobs) == len(tasks) * (2 + len(CHEATS))
    with open_results(tmp_path / "out", {}) as results:
        asyncio.run(run_jobs(jobs, results, concurrency=4, seed=0))
        proof = build_proof({"dataset": "tasks"}, tasks, list(results.records.values()), faults)
    found = {
        verdict["task"].rpartition("tasks/")[2]: " ".join(verdict["reasons"])
        for verdict in proof["tasks"]
        if not verdict["ok"]
    }
    assert set(found) == {"upside-down", "pays-cheats", "malformed/task.toml"}
    assert (
        "oracle run 1 ended as failure with reward 0" in found["upside-down"]
        and "noop run 1 ended as success with reward 1" in found["upside-down"]
    )
    assert (
        "noop" not in found["pays-cheats"]
        and "oracle" not in found["pays-cheats"]
        and "trick: forge" in found["pays-cheats"]
    )
    assert "task.toml:1" in found["malformed/task.toml"]
    assert not proof["valid"] and (proof["sound"], proof["total"]) == (1, 4)
    write_proof(tmp_path / "out", proof)
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["sound"] == 1


def test_no_run_of_an_agent_proves_nothing():
    played = [record("oracle", 0, 1.0, "success"), record("noop", 0, 0.0), record("cheat", 0, 0.0)]
    assert judge("t", played)["ok"]
    for left_out in range(3):
        rest = [one for number, one in enumerate(played) if number != left_out]
        assert judge("t", rest)["reasons"] == [f"{played[left_out]['agent']} was not played"]


def test_a_solution_that_does_not_always_earn_the_same_is_flaky():
    verdict = judge(
        "t",
        [
            record("oracle", 0, 1.0, "success"),
            record("oracle", 1, 0.0),
            record("oracle", 2, 1.0, "success"),
            record("noop", 0, 0.0),
            record("cheat", 0, 0.0),
        ],
    )
    assert verdict["flaky"] and "flaky" in verdict["reasons"][0] and not verdict["ok"]
    assert verdict["oracle_seconds"] == {"least": 1.0, "most": 3.0}


def test_a_cheat_or_a_solution_that_ends_as_a_fault_of_the_infrastructure_proves_nothing():
    sound = [record("oracle", 0, 1.0, "success"), record("noop", 0, 0.0), record("cheat", 0, 0.0)]
    assert judge("t", sound)["ok"]
    for index in range(3):
        changed = [
            *sound[:index],
            sound[index] | {"reward": None, "ending": "infra_verifier"},
            *sound[index + 1 :],
        ]
        verdict = judge("t", changed)
        assert not verdict["ok"] and not verdict["flaky"] and len(verdict["reasons"]) == 1
