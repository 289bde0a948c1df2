"""Nothing that ended is played again, nothing is lost, and what the infrastructure spoiled never
becomes a 0.
"""

import asyncio
import json

import pytest

from rome.evals import runner
from rome.evals.agents import Outcome, spoiled
from rome.evals.runner import EvalError, Job, open_results, run_jobs
from tests.rome.evals.tasks import Played, terminal, won

IDENTITY = {"dataset": "d", "agent": "played", "seed": 0}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(runner, "RETRY_WAIT_SECONDS", 0.0)


def run(out, agent, attempts=2, tasks=None, concurrency=3, seed=0):
    """(records by key, how many were played)."""
    jobs = [
        Job(agent, task, attempt) for task in tasks or terminal() for attempt in range(attempts)
    ]
    with open_results(out, IDENTITY) as results:
        played = asyncio.run(run_jobs(jobs, results, concurrency=concurrency, seed=seed))
        return dict(results.records), played


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_attempt_is_kept_once_and_not_played_again(tmp_path):
    first, second = Played(won), Played(won)
    assert run(tmp_path, first)[1] == 8 and len(lines(tmp_path)) == 8
    assert run(tmp_path, second)[1] == 0 and not second.calls
    assert run(tmp_path, second, attempts=3)[1] == 4 and {
        attempt for _, attempt in second.calls
    } == {2}


def test_no_more_play_at_once_than_allowed(tmp_path):
    agent = Played(won, seconds=0.005)
    run(tmp_path, agent, concurrency=3)
    assert agent.most_at_once == 3


def test_each_attempt_samples_with_a_seed_of_its_own_that_depends_on_the_run(tmp_path):
    agents = [Played(won) for _ in range(3)]
    for number, (agent, seed) in enumerate(zip(agents, (0, 0, 1), strict=True)):
        run(tmp_path / str(number), agent, seed=seed)
    assert sorted(agents[0].seeds) == sorted(agents[1].seeds) and len(set(agents[0].seeds)) == 8
    assert not set(agents[0].seeds) & set(agents[2].seeds)


def test_what_infrastructure_spoils_is_tried_again_and_then_succeeds(tmp_path):
    agent = Played(
        lambda task, attempt, tries: (
            spoiled("infra_engine", "down") if tries < 3 else Outcome(1.0, "success")
        )
    )
    records, _ = run(tmp_path, agent, attempts=1)
    assert {(one["reward"], one["ending"], one["tries"]) for one in records.values()} == {
        (1.0, "success", 3)
    }
    assert len(set(agent.seeds)) == 12  # another seed for each try


def test_after_bounded_tries_an_ending_without_a_reward_is_kept_until_the_next_command_tries_again(
    tmp_path,
):
    broken = Played(lambda *_: spoiled("infra_sandbox", "no room"))
    records, _ = run(tmp_path, broken, attempts=1)
    assert {
        (one["reward"], one["ending"], one["tries"], one["note"]) for one in records.values()
    } == {(None, "infra_sandbox", 3, "no room")}
    records, played = run(tmp_path, Played(won), attempts=1)
    assert played == 4 and {one["reward"] for one in records.values()} == {1.0}
    assert run(tmp_path, Played(won), attempts=1)[1] == 0  # and the later record counts


def test_what_trying_again_cannot_mend_is_tried_once(tmp_path):
    agent = Played(lambda *_: spoiled("infra_sandbox", "needs a GPU", permanent=True))
    run(tmp_path, agent, attempts=1)
    assert set(agent.calls.values()) == {1}


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_that_a_kill_cut_off_is_dropped_and_its_attempt_played_again(tmp_path, kept):
    run(tmp_path, Played(won))
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:5]) + whole[5][:kept])
    records, played = run(tmp_path, Played(won))
    assert played == 3 and len(records) == 8 and len(lines(tmp_path)) == 8


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run(tmp_path, Played(won))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"task"', b'{"tusk"', 1))
    with pytest.raises(EvalError, match=r"results.jsonl:1"):
        run(tmp_path, Played(won))


def test_another_evaluation_in_the_same_folder_is_refused_and_told_what_differs(tmp_path):
    run(tmp_path, Played(won))
    before = (tmp_path / "results.jsonl").read_bytes()
    with (
        pytest.raises(EvalError, match="seed is '0' there and '1' now") as error,
        open_results(tmp_path, IDENTITY | {"seed": 1}),
    ):
        pass
    assert "dataset" not in str(error.value)
    with (
        pytest.raises(EvalError, match="model is 'None' there"),
        open_results(tmp_path, IDENTITY | {"model": "m"}),
    ):
        pass
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    with (
        open_results(tmp_path, IDENTITY),
        pytest.raises(EvalError, match="another process"),
        open_results(tmp_path, IDENTITY),
    ):
        pass


def test_results_of_nobody_knows_what_are_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(EvalError, match=r"without a run.json"), open_results(tmp_path, IDENTITY):
        pass


def test_a_bug_ends_the_run_and_keeps_what_had_ended(tmp_path):
    def end(task, attempt, tries):
        if task.endswith("/1000001"):
            raise ZeroDivisionError("a bug")
        return Outcome(1.0, "success")

    with pytest.raises(ExceptionGroup):
        run(tmp_path, Played(end), concurrency=1)
    assert len(lines(tmp_path)) == 4
