"""launch.eval as a process: what programs read is there, a killed run is taken up again, and a
wrong command is one clear line.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from envs.rock import probe
from tests.paths import ROOT
from tests.rome.evals.tasks import GUARDED, write_task

DEADLINE = 60.0


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.eval", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    out, error = process.communicate(timeout=DEADLINE)
    return process.returncode, out, error


def records(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_after_a_kill_the_same_command_plays_only_what_is_missing_and_another_is_refused(tmp_path):
    """The no-op of two tasks, one slow to start, is killed when some attempts have ended."""
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    write_task(tasks, "a")
    write_task(tasks, "b", dockerfile="FROM ubuntu:24.04\nWORKDIR /app\nRUN sleep 0.3\n")
    command = (
        "--dataset",
        tasks,
        "--agent",
        "noop",
        "--attempts",
        4,
        "--concurrency",
        2,
        "--out",
        out,
    )
    process, ends = start(*command), time.monotonic() + DEADLINE
    while (
        time.monotonic() < ends
        and process.poll() is None
        and (not (out / "results.jsonl").exists() or len(records(out)) < 4)
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    kept = records(out)
    assert (
        process.returncode == -signal.SIGKILL
        and 4 <= len(kept) < 8
        and not (out / "results.json").exists()
    )
    with open(out / "results.jsonl", "a") as file:
        file.write('{"task": "b", "att')  # what a kill in the middle of a write leaves
    status, said, error = run(*command)
    assert status == 0, error
    assert f"{8 - len(kept)} attempts played" in said and f"{len(kept)} were there already" in said
    assert (
        records(out)[: len(kept)] == kept
        and len({(one["task"], one["attempt"]) for one in records(out)}) == len(records(out)) == 8
    )
    results = json.loads((out / "results.json").read_text())
    assert {"task", "attempt", "reward", "ending", "seconds"} <= set(results["tasks"][0]) and len(
        results["tasks"]
    ) == 8
    assert (
        results["mean_reward"]
        == results["pass_at_1"]
        == results["pass_at_k"]
        == results["avg_at_k"]
        == 0.0
        and results["complete"]
    )
    assert (
        results["by_domain"]["files"]["tasks"] == 2
        and results["by_ending"] == {"failure": 8}
        and (out / "report.html").exists()
    )
    status, _, error = run(*command[:3], "oracle", *command[4:])
    assert (
        status == 2 and "agent is 'noop' there and 'oracle' now" in error and error.count("\n") == 1
    )


@pytest.mark.long
def test_one_task_that_is_not_supported_is_left_out_and_the_others_are_played(tmp_path):
    write_task(tmp_path / "tasks", "good")
    write_task(tmp_path / "tasks", "new", task_toml='version = "2.0"\n')
    write_task(tmp_path / "tasks", "gpu", task_toml='version = "1.0"\n[environment]\ngpus = 1\n')
    command = ("--dataset", tmp_path / "tasks", "--agent", "oracle", "--out", tmp_path / "out")
    status, said, error = run(*command)
    assert status == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    new, gpu = results["left_out"]
    assert "new/task.toml" in new["task"] and "2.0" in new["reason"]
    assert gpu["task"] == "gpu" and "gpus = 1" in gpu["reason"]
    assert results["counted"] == 1 and results["pass_at_1"] == 1.0
    assert "left out: gpu: " in said and "2 tasks are left out" in said
    status, _, error = run("--dataset", tmp_path / "tasks" / "new", *command[2:-1], tmp_path / "o")
    assert status == 2 and "can be used" in error and error.count("\n") == 1


@pytest.mark.long
def test_validation_fails_with_the_tasks_and_why(tmp_path):
    write_task(tmp_path / "tasks", "free", test="#!/bin/bash\necho 1 > /logs/verifier/reward.txt\n")
    status, said, _ = run(
        "--dataset", tmp_path / "tasks", "--validate", "--attempts", 1, "--out", tmp_path / "out"
    )
    assert (
        status == 1
        and "free: noop run 1 ended as success" in said
        and "0 of 1 tasks are sound" in said
    )
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["valid"] is False


def test_contamination_is_an_exit_status(tmp_path):
    write_task(
        tmp_path / "tasks",
        "known",
        instruction=(
            "Write the word hello into the file out.txt which lies in the folder named app, and"
            " nothing else.\n"
        ),
    )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(
        "> WRITE the word *hello* into the\nfile out.txt, which lies in the folder named app and"
        " nothing"
    )
    status, said, error = run(
        "--dataset",
        tmp_path / "tasks",
        "--decontaminate",
        tmp_path / "corpus",
        "--out",
        tmp_path / "out",
    )
    assert status == 1 and "known: 86 % of its word runs" in said, error


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--dataset", "harbor", "--agent", "policy", "--out", "OUT"), "needs --checkpoint"),
        (
            ("--dataset", "harbor", "--temperature", "1", "--out", "OUT"),
            "--temperature is not read by --agent oracle",
        ),
        (("--dataset", "harbor", "--agent", "anyone", "--out", "OUT"), "'anyone' is unknown"),
        (("--dataset", "harbor", "--agent", "command:x", "--out", "OUT"), "needs --checkpoint"),
        (("--dataset", "harbor", "--agent", "iflow", "--out", "OUT"), "needs --checkpoint"),
        (
            ("--dataset", "harbor", "--agent_files", ".", "--out", "OUT"),
            "--agent_files is not read by --agent oracle",
        ),
        (
            *[("--dataset", "harbor", "--agent", "command: ", "--checkpoint", ".", "--out", "OUT")],
            "names no command",
        ),
        (
            *[("--dataset=games:all:9", "--agent=command:x", "--checkpoint", ".", "--out", "OUT")],
            "needs tasks with a sandbox",
        ),
        (
            *[("--dataset=harbor", "--agent=command:x", "--checkpoint=.", "--model=m", "--out=x")],
            "needs both --endpoint URL and --model NAME",
        ),
    ],
)
def test_a_wrong_command_is_one_line_and_leaves_nothing(tmp_path, arguments, said):
    status, _, error = run(*(tmp_path / "out" if one == "OUT" else one for one in arguments))
    assert (
        status != 0 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    )


@pytest.mark.slow
def test_a_checkpoint_plays_through_the_engine_that_is_started_for_it(tmp_path):
    """A model of random weights: it solves nothing, every attempt counts, and the figures say what
    it sampled.
    """
    from tests.rome.serve.tiny import make_checkpoint

    status, said, error = run(
        "--dataset",
        "terminal:count:2",
        "--agent",
        "policy",
        "--checkpoint",
        make_checkpoint(tmp_path / "model"),
        "--attempts",
        2,
        "--max_tokens",
        20,
        "--out",
        tmp_path / "out",
        JAX_PLATFORMS="cpu",
    )
    assert status == 0, error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        results["attempts_counted"] == 4
        and results["pass_at_1"] == 0.0
        and results["cost"]["tokens"]["completion"] > 0
    )
    assert "pass@2 0.000" in said


def test_a_command_is_refused_where_a_sandbox_has_no_door(monkeypatch):
    from launch import _eval_flags as given

    monkeypatch.setattr(given, "playing_agent", lambda: given.COMMAND)
    with pytest.raises(ValueError, match="landlock tier"):
        given.check_command("landlock", [])
    given.check_command("namespaces", [])


class OutsideModel(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server: writes the file of the task, then says that it is done."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = {"name": "bash", "arguments": '{"command": "echo hello > out.txt"}'}
        message = {"role": "assistant", "content": "done"}
        if body["messages"][-1]["role"] == "user":
            message["tool_calls"] = [{"id": "c", "type": "function", "function": call}]
        answer = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.mark.long
def test_an_outside_model_plays_behind_an_outside_agent(tmp_path):
    from rome.model.tokenizer import TINY

    if probe(tier="namespaces").tier is None:
        pytest.skip("no namespaces tier here")
    write_task(tmp_path / "tasks", "a")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OutsideModel) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = (
            *("--dataset", tmp_path / "tasks", "--checkpoint", TINY, "--model", "big"),
            *("--agent_files", ROOT / "examples" / "agents"),
            *("--agent", "command:python3 $AGENT_FILES/outside_agent.py"),
            *("--endpoint", f"http://127.0.0.1:{server.server_port}/v1"),
        )
        status, _, error = run(*command, "--out", tmp_path / "out")
        assert status == 0, error
        run(*command, "--max_turns", 1, "--out", tmp_path / "once")
        server.shutdown()
    (record,) = records(tmp_path / "out")
    assert (record["reward"], record["turns"]) == (1.0, 2)
    (once,) = records(tmp_path / "once")
    assert (once["reward"], once["turns"]) == (1.0, 1)
    assert "used up" in once["note"] or "status 1" in once["note"]  # whichever comes first
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (settings["agent"], settings["model"]) == ("command", "big")


@pytest.mark.slow
def test_the_iflow_agent_plays_a_checkpoint_as_the_plain_loop_does(tmp_path):
    """The same seeds and a real engine: the same tokens; with tools and compaction it plays too."""
    from rome.data.trajectory import load_trajectory
    from tests.rome.serve.tiny import make_checkpoint

    common = (
        *("--dataset", "terminal:count:3", "--max_tokens", 24, "--attempts", 2),
        *("--checkpoint", make_checkpoint(tmp_path / "model")),
    )
    played = {}
    for name, flags in {
        "policy": (),
        "iflow": (),
        "more": ("--iflow_tools", "task", "--iflow_compaction", 0.5, "--max_context", 300),
    }.items():
        agent = "iflow" if name == "more" else name
        out = tmp_path / name
        status, _, error = run(*common, *flags, "--agent", agent, "--out", out, JAX_PLATFORMS="cpu")
        assert status == 0, error
        played[name] = {
            (record["task"], record["attempt"]): load_trajectory(out / record["transcript"])
            for record in records(out)
        }
    assert len(played["policy"]) == 6
    for key, theirs in played["policy"].items():
        ours = played["iflow"][key]
        assert [c.action_ids for c in ours.chunks] == [c.action_ids for c in theirs.chunks]
        assert [c.prompt_ids for c in ours.chunks] == [c.prompt_ids for c in theirs.chunks]
        assert [c.observation for c in ours.chunks] == [c.observation for c in theirs.chunks]
        assert (ours.ending, ours.reward) == (theirs.ending, theirs.reward)
    settings = json.loads((tmp_path / "more" / "run.json").read_text())
    assert (settings["iflow_tools"], settings["iflow_compaction"]) == (["task"], 0.5)


@pytest.mark.slow
def test_a_checkpoint_plays_behind_an_agent_that_knows_nothing_of_it(tmp_path):
    """A model of random weights: what it says reaches the agent, and is kept as it was sampled."""
    from rome.data.trajectory import load_trajectory
    from tests.rome.serve.tiny import make_checkpoint

    command = (
        *("--dataset", "terminal:count:2", "--max_tokens", 20, "--out", tmp_path / "out"),
        *("--agent_files", ROOT / "examples" / "agents"),
        *("--checkpoint", make_checkpoint(tmp_path / "model")),
        *("--agent", "command:TELL_TOOLS=0 python3 $AGENT_FILES/outside_agent.py"),
    )
    status, said, error = run(*command, JAX_PLATFORMS="cpu")
    assert status == 0 and "command on terminal:count:2" in said, error
    for record in records(tmp_path / "out"):
        assert record["agent"] == "command" and record["turns"] > 0
        kept = load_trajectory(tmp_path / "out" / record["transcript"])
        assert kept.num_action_tokens == record["tokens"]["completion"] > 0
    status, said, _ = run(*command, JAX_PLATFORMS="cpu")
    assert status == 0 and "0 attempts played" in said
    status, _, error = run(*command[:-1], "command:true", JAX_PLATFORMS="cpu")
    assert status == 2 and "belongs to another evaluation: command is" in error


@pytest.mark.long
def test_a_base_image_that_cannot_be_had_is_stood_for_by_this_system(tmp_path):
    write_task(
        tmp_path / "tasks", "a", dockerfile="FROM registry.example/team/base:7\nWORKDIR /app\n"
    )
    command = ("--dataset", tmp_path / "tasks", "--agent", "oracle", "--out")
    code, _, _ = run(*command, tmp_path / "refused")
    assert code == 1 and "registry.example/team/base:7" in records(tmp_path / "refused")[0]["note"]
    how = ["--stands_for=registry.example/team/base=bash,sed", "--max_turns=7", "--disk_mb=100"]
    assert run(*command, tmp_path / "out", *how)[0] == 0
    assert records(tmp_path / "out")[0]["reward"] == 1.0
    # How tasks are played is part of what the results are of.
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["stands_for"] == ["registry.example/team/base=bash,sed"]
    assert (settings["max_turns"], settings["disk_mb"]) == (7, 100)
    code, _, error = run(*command, tmp_path / "out", *how[:2])
    assert code == 2 and "disk_mb" in error


@pytest.mark.long
@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--stands_for=python3", "is not IMAGE=PROGRAM"),
        ("--verifier_tools=/nowhere", "/nowhere is no folder; make it by `pip install --target"),
    ],
)
def test_a_flag_that_cannot_be_read_is_named(tmp_path, flag, says):
    write_task(tmp_path / "tasks", "a")
    code, _, error = run("--dataset", tmp_path / "tasks", "--out", tmp_path / "out", flag)
    assert code == 2 and says in error


@pytest.mark.long
def test_a_tasks_variables_come_from_the_command_by_name_and_from_nowhere_else(tmp_path):
    toml = 'version = "1.0"\n[verifier.env]\nJUDGE = "${JUDGE}"\n'
    guarded = GUARDED.replace("echo 1", 'test "$JUDGE" = secret=1 && echo 1')
    assert guarded != GUARDED
    write_task(tmp_path / "tasks", "a", task_toml=toml, test=guarded)
    command = ("--dataset", tmp_path / "tasks", "--agent", "oracle", "--out")
    code, _, error = run(*command, tmp_path / "none", JUDGE="secret=1")
    assert code == 2 and "task.toml:3" in error and "--task_env JUDGE=VALUE" in error
    given = ("--task_env", "JUDGE")
    assert run(*command, tmp_path / "out", *given, JUDGE="secret=1")[0] == 0
    assert records(tmp_path / "out")[0]["reward"] == 1.0
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written and not any(b"secret=1" in content for content in written)
