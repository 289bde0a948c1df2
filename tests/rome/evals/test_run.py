"""An evaluation is one call from Python, and the same call continues it."""

import asyncio
import json

from rome.evals.agents import spoiled
from rome.evals.run import Progress, describe_results, evaluate
from tests.rome.evals.tasks import Played, terminal, won


def play(agent, out, **options):
    progress = Progress()
    results = asyncio.run(
        evaluate("terminal:count,sum:4", agent, out, on_finish=progress, **options)
    )
    return results, progress


def test_the_results_are_returned_and_written_and_the_same_call_plays_nothing_again(tmp_path):
    results, progress = play(Played(won), tmp_path, attempts=2)
    assert results["pass_at_1"] == 1.0 and results["complete"] and progress.done == 8
    assert {record["task"] for record in results["tasks"]} == {task.name for task in terminal()}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert describe_results(results).startswith("played on terminal:count,sum:4: pass@1 1.000")
    again, progress = play(Played(won), tmp_path, attempts=2)
    assert progress.done == 0 and again["tasks"] == results["tasks"]
    assert progress.summary(8).endswith("8 were there already")


def test_an_interrupted_evaluation_reports_what_was_played(tmp_path):
    def end(task, attempt, tries):
        if task.startswith("sum"):
            raise KeyError("a bug in the agent")
        return won()

    try:
        play(Played(end), tmp_path, concurrency=1)
    except* KeyError:
        pass
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["complete"] and 0 < results["attempts"] < 4


def test_spoiled_attempts_are_in_no_metric(tmp_path):
    agent = Played(lambda *_: spoiled("infra_sandbox", "no room", permanent=True))
    results, _ = play(agent, tmp_path)
    assert results["pass_at_1"] is None and results["attempts_counted"] == 0
