"""A workdir has one owner at a time, and none after its owner was killed."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from rome.train.ownership import Ownership
from rome.train.workdir import ConfigError
from tests.paths import ROOT

HOLD = """
import pathlib, subprocess, sys
from rome.train.ownership import Ownership
owned = Ownership(pathlib.Path(sys.argv[1]))
# An engine that outlives its trainer.
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns tmp_path / "run", with a child of its own: (process, child)."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.communicate(timeout=60)
    os.kill(child, signal.SIGKILL)


def test_the_second_owner_is_told_who_the_first_one_is(tmp_path, holder):
    process, _ = holder
    owner = f"process {process.pid} on {socket.gethostname()}"
    for _ in range(2):  # being refused takes nothing from the owner
        with pytest.raises(ConfigError, match=owner):
            Ownership(tmp_path / "run")
    Ownership(tmp_path / "run" / "init").close()
    Ownership(tmp_path / "other").close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_workdir_of_a_killed_run_is_free_although_its_children_live(tmp_path, holder, number):
    process, child = holder
    process.send_signal(number)
    process.wait(timeout=60)
    os.kill(child, 0)  # it lives
    with Ownership(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / "lock").read_text()


def test_an_owner_in_this_process_excludes_another_one_until_it_closes(tmp_path):
    with Ownership(tmp_path), pytest.raises(ConfigError, match=str(os.getpid())):
        Ownership(tmp_path)
    Ownership(tmp_path).close()
