"""The life of a `launch.serve` process, its command line, and its end."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from rome.engine.errors import EngineError
from rome.engine.process import PORT_IN_USE, ROOT, ServerProcess, start_server
from tests.rome.serve.tiny import ONE_PROGRAM, make_checkpoint, serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "a")


def launch(*flags):
    return subprocess.run(
        [sys.executable, "-m", "launch.serve", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def status_of(url, headers=None, data=None):
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data=data, headers=headers or {}), timeout=60
        ) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def gone(pid, seconds=60.0):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        state = pathlib.Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.long
def test_a_port_in_use_is_one_clear_line(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = launch("--model_path", checkpoint, "--port", port)
    assert result.returncode == PORT_IN_USE
    assert result.stderr.splitlines() == [
        f"launch.serve: cannot listen on 127.0.0.1:{port}: Address already in use. Choose another"
        " --port, or stop the program that uses it."
    ]


@pytest.mark.long
def test_a_port_in_use_is_told_by_start_server_too(checkpoint, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match="Address already in use"):
            start_server(checkpoint, tmp_path / "log", port=taken.getsockname()[1])


@pytest.mark.long
@pytest.mark.parametrize(
    "flags, words",
    [
        pytest.param(
            ["--model_path", "/nowhere"],
            "cannot read /nowhere/config.json",
            marks=pytest.mark.slow,
        ),
        (
            ["--model_path", "MODEL", "--max_context", "100000"],
            "--max_context 100000 exceeds the model's 512 positions",
        ),
        pytest.param(
            ["--model_path", "MODEL", "--slots", "0"],
            "--slots must be at least 1, got 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(checkpoint, flags, words):
    result = launch("--port", 0, *(str(checkpoint) if flag == "MODEL" else flag for flag in flags))
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.mark.long
def test_a_server_that_cannot_start_shows_the_end_of_its_log(checkpoint, tmp_path):
    broken = make_checkpoint(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(
        EngineError, match=r"(?s)ended with status 1 before it was ready.*scheduler ended"
    ):
        serve(broken, tmp_path / "log", *ONE_PROGRAM)


@pytest.mark.long
def test_a_key_guards_everything_but_health_and_the_server_ends_on_demand(checkpoint, tmp_path):
    flags = ("--api_key", "secret", "--skip_tokenizer_init", *ONE_PROGRAM)
    with serve(checkpoint, tmp_path / "log", *flags) as server:
        assert status_of(server.url + "/health") == 200
        assert status_of(server.url + "/model_info") == 401
        assert status_of(server.url + "/model_info", {"Authorization": "Bearer wrong"}) == 401
        assert status_of(server.url + "/model_info", {"Authorization": "Bearer secret"}) == 200
        with urllib.request.urlopen(
            urllib.request.Request(
                server.url + "/server_info", headers={"Authorization": "Bearer secret"}
            ),
            timeout=60,
        ) as response:
            assert b"secret" not in response.read()
        for body in (
            b'{"text": "a"}',
            b'{"input_ids": [1], "sampling_params": {"stop": "a"}}',
        ):  # there is no tokenizer
            assert (
                status_of(server.url + "/generate", {"Authorization": "Bearer secret"}, body) == 400
            )
        server.stop()
        assert server.process.returncode == 0 and not server.alive()


def test_a_server_ends_when_its_parent_is_killed(checkpoint, tmp_path):
    script = f"""
import sys, time
from tests.rome.serve.tiny import ONE_PROGRAM, serve
server = serve({str(checkpoint)!r}, {str(tmp_path / "log")!r}, *ONE_PROGRAM)
print(server.process.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        server = int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.wait()
    assert gone(server)


@pytest.mark.long
def test_a_server_that_ignores_the_polite_signal_is_killed(checkpoint, tmp_path):
    server = serve(checkpoint, tmp_path / "log", *ONE_PROGRAM)
    os.kill(server.process.pid, signal.SIGSTOP)  # a stopped process does not see SIGTERM
    server.stop(grace_seconds=0.5)
    assert gone(server.process.pid) and not server.alive()


def test_a_server_that_was_stopped_for_good_is_not_started_again(tmp_path):
    def start():
        return subprocess.Popen(["sleep", "600"], start_new_session=True)

    server = ServerProcess("http://127.0.0.1:9", start(), tmp_path / "log", start)
    first = server.process
    server.stop()
    with pytest.raises(EngineError, match="was stopped; it is not started again"):
        server.restart(1)
    assert server.process is first and gone(first.pid)


def test_a_restart_that_does_not_answer_is_an_error_with_the_log(tmp_path):
    (tmp_path / "log").write_text("out of memory")

    def start():
        command = [sys.executable, "-c", "raise SystemExit(7)"]
        return subprocess.Popen(command, start_new_session=True)

    server = ServerProcess("http://127.0.0.1:9", start(), tmp_path / "log", start)
    with pytest.raises(
        EngineError, match=r"(?s)ended with status 7 when it was started again.*out of memory"
    ):
        server.restart(60)
