"""An evaluation is one call from Python, and the same call continues it."""

import asyncio
import json

from envs.tasks.harbor import TaskError
from rome.data.trajectory import load_trajectory
from rome.evals.agents import Outcome, Scripted, spoiled
from rome.evals.run import Progress, describe_left_out, describe_results, evaluate
from tests.rome.evals.tasks import CONFIG, Played, terminal, won


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


def test_tasks_that_say_nothing_are_named_counted_and_left_out(tmp_path):
    """One cannot be read, one not be played here; one was spoiled by chance and is no such task."""
    unplayable, unlucky = sorted(task.name for task in terminal())[:2]

    def end(task, attempt, tries):
        if task == unplayable:
            return spoiled("infra_verifier", "the tests need pandas", permanent=True)
        if task == unlucky and attempt == 0:
            return spoiled("infra_sandbox", "no room")
        return won()

    faults = [TaskError("tasks/new/task.toml", 1, "version 2.0 is not known")]
    results, _ = play(Played(end), tmp_path, attempts=2, faults=faults)
    assert results["left_out"] == [
        {"task": "tasks/new/task.toml:1", "reason": "version 2.0 is not known"},
        {"task": unplayable, "reason": "the tests need pandas"},
    ]
    assert results["counted"] == 3 and results["pass_at_1"] == 1.0
    assert describe_results(results).endswith("; 2 tasks are left out")
    assert describe_left_out(results["left_out"])[1] == (
        f"left out: {unplayable}: the tests need pandas"
    )
    page = (tmp_path / "report.md").read_text()
    assert "Left out: 2 tasks" in page and "the tests need pandas" in page


def test_settings_that_were_not_honoured_are_said(tmp_path):
    note = "environment.storage_mb = 10240, and the sandbox has 256"
    results, _ = play(Played(lambda *_: Outcome(1.0, "success", notes=(note,))), tmp_path)
    names = [task.name for task in terminal()]
    assert results["approximated"] == [{"note": note, "tasks": names}]
    assert "storage\\_mb" in (tmp_path / "report.md").read_text().replace("_", "\\_")


def test_every_attempt_keeps_its_transcript_and_what_its_tests_printed(tmp_path):
    spec = "0.5*terminal:count + 0.5*games:guess_the_number"
    results = asyncio.run(evaluate(spec, Scripted("oracle", CONFIG), tmp_path))
    shell, game = results["tasks"]
    told = load_trajectory(tmp_path / shell["transcript"])
    assert (told.task, told.ending, told.reward) == (shell["task"], "success", 1.0)
    assert len(told.chunks) == shell["turns"] and told.chunks[0].tool_call["name"] == "bash"
    assert told.chunks[0].observation and "Count" in told.instruction
    assert (tmp_path / shell["verifier_output"]).read_text() == "1\n"
    told = load_trajectory(tmp_path / game["transcript"])
    assert told.chunks[-1].text.startswith("<answer>") and "verifier_output" not in game
    assert set(results["by_source"]) == {"terminal:count", "games:guess_the_number"}
    assert set(results["by_family"]) == {shell["family"], game["family"]}
