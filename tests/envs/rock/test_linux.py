"""System calls through ctypes: what they return, and errors that name the call."""

import ctypes
import errno
import os
import subprocess
import sys

import pytest

from envs.rock.host import linux


@pytest.mark.parametrize("size", [0, 1, linux._READ_BYTES, 3 * linux._READ_BYTES + 1])
def test_a_file_is_read_as_it_was_written(tmp_path, size):
    path = str(tmp_path / "file")
    linux.write_file(path, b"longer than nothing")
    content = os.urandom(size)
    linux.write_file(path, content)
    assert linux.read_file(path) == content


def test_a_pipe_is_read_to_its_end():
    with subprocess.Popen(["head", "-c", "300000", "/dev/zero"], stdout=subprocess.PIPE) as writer:
        assert linux.read_all(writer.stdout.fileno()) == bytes(300_000)


@pytest.mark.parametrize(
    ("call", "number", "says"),
    [
        (lambda: linux.prctl(-1, 0), errno.EINVAL, "prctl -1"),
        (lambda: linux.setns(-1, 0), errno.EBADF, "setns"),
        (lambda: linux.mount("none", "/no/such", "tmpfs", 0), None, "mount none on /no/such"),
        (lambda: linux.open_beneath(-1, "x", os.O_RDONLY), errno.EBADF, "open x"),
        (lambda: linux.clone_mount("/no/such"), None, "open_tree /no/such"),
    ],
)
def test_a_call_that_fails_is_named(call, number, says):
    with pytest.raises(OSError, match=says) as caught:
        call()
    assert number is None or caught.value.errno == number


def test_children_are_found_whichever_thread_started_them():
    script = (
        "import subprocess, threading\n"
        "start = lambda: subprocess.Popen(['sleep', '60'])\n"
        "start(); thread = threading.Thread(target=start); thread.start(); thread.join()\n"
        "print(flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        parent.stdout.readline()
        children = linux.children_of(parent.pid)
        assert len(children) == 2
        assert linux.descendants_of({parent.pid}) == {parent.pid, *children}
        linux.kill_trees(lambda: linux.descendants_of({parent.pid}))
    assert linux.children_of(parent.pid) == []


def test_a_system_without_such_calls_imports_the_module_and_says_what_it_lacks():
    missing = linux._declare("no_such_call", (ctypes.c_int,))
    with pytest.raises(OSError, match="this system has no no_such_call") as caught:
        missing(1)
    assert caught.value.errno == errno.ENOSYS
