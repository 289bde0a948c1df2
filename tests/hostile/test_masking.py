"""Hostile commands: no agent turns its failure into one of the infrastructure, which is masked."""

import dataclasses

import pytest

from envs.gem import format_tool_call, make
from envs.rock import AgentFault, Sandbox, SandboxStartError
from envs.tasks.terminal.env import TerminalEnv
from envs.tasks.terminal.task import make_task
from tests.hostile.sandboxes import changed_zygote, inside, make_config, needs, python

# How kernels before 6.6 answer: they stack nothing on a tmpfs, and files are copied instead.
WITHOUT_OVERLAYS = """
from host import linux
mount = linux.mount
def refuse(source, target, kind, *rest):
    if kind == "overlay":
        raise OSError(22, "no overlay here")
    mount(source, target, kind, *rest)
linux.mount = refuse
"""
# Processes whose memory takes too long to free: whatever is left is not dead in time.
DEATHS_TOO_SLOW = "from host import namespaces; namespaces.KILL_SECONDS = -1"
# The same of a command's own process: it does not end when it is killed.
COMMANDS_DO_NOT_DIE = (
    "from host import linux, running; running.KILL_SECONDS = 0.1;"
    " linux.signal_process = lambda *_: None"
)
DEEP = "mkdir -p $(printf 'd/%.0s' $(seq 70))"
MEMORY = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
for key in range(60):
    identity = libc.shmget(key + 1, 1 << 20, 0o1600)
    if identity < 0 or os.fork() == 0: break
    libc.memset(ctypes.c_void_p(libc.shmat(identity, 0, 0)), 1, 1 << 20)
"""
FILL = "head -c 1G /dev/zero > /dev/shm/x; head -c 1G /dev/zero > /tmp/x; "


def line(code: str) -> str:
    return f"exec({code!r})"


def play(env, *commands: str):
    """Play commands and hand in; return reward, ending and the turns that were played."""
    env.reset()
    try:
        for turn, command in enumerate((*commands, None), 1):
            action = "done" if command is None else format_tool_call("bash", {"command": command})
            _, reward, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                return reward, info["ending"], turn
    finally:
        env.close()
    raise AssertionError("the episode did not end")


def test_a_tree_too_deep_to_copy_is_the_agents_failure(monkeypatch):
    with changed_zygote(monkeypatch, line(WITHOUT_OVERLAYS)):
        env = make("terminal/count", sandbox_config=make_config("namespaces"))
        assert play(env, DEEP) == (0.0, "failure", 2)
        assert play(env, "true; " + DEEP.replace("70", "200"))[:2] == (0.0, "failure")
        assert play(env, "mkdir -p a/b/c")[1] == "failure"  # judged, by the verifier


DEEDS = {
    "a deep tree": DEEP,
    "long paths": "n=$(printf 'x%.0s' $(seq 200)); for i in $(seq 30); do mkdir $n && cd $n; done",
    "a full disk": "head -c 1G /dev/zero > x; head -c 1G /dev/zero > /tmp/x",
    "odd files": "mkfifo p; ln -s . self; ln -s /nowhere gone; touch -- '-n' $'a\\nb' $'\\xff'",
    "a daemon": "setsid sh -c 'trap : TERM HUP; while :; do :; done' > /dev/null 2>&1 &",
    "no rights by default": python(
        "import os, struct\n"
        "acl = struct.pack('<I', 2)\n"
        "for tag in (1, 4, 32): acl += struct.pack('<HHI', tag, 0, 2**32 - 1)\n"
        "os.setxattr('.', 'system.posix_acl_default', acl)"
    ),
    "marks of overlays": python(
        "import os\n"
        "for name in os.listdir('.'):\n"
        "    for mark in ('whiteout', 'opaque', 'redirect'):\n"
        "        try: os.setxattr(name, 'user.overlay.' + mark, b'y')\n"
        "        except OSError: pass"
    ),
    "no rights": "mkdir -p a/b; chmod 0 a/b a .",
}


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
def test_a_failing_episode_is_a_failure_whatever_was_done(tier, deed):
    env = make("terminal/count", sandbox_config=make_config(tier), command_timeout=3.0)
    assert play(env, deed)[:2] == (0.0, "failure")


def test_processes_that_die_too_slowly_are_the_agents_failure(monkeypatch):
    left = "setsid sleep 60 > /dev/null 2>&1 & "
    with changed_zygote(monkeypatch, DEATHS_TOO_SLOW):
        env = make("terminal/count", sandbox_config=make_config("namespaces"))
        assert play(env, left) == (0.0, "failure", 1)
        assert play(env, "true", left) == (0.0, "failure", 2)


def test_a_command_that_does_not_end_when_it_is_killed_is_the_agents_failure(monkeypatch):
    with changed_zygote(monkeypatch, COMMANDS_DO_NOT_DIE):
        env = make("terminal/count", sandbox_config=make_config("namespaces"), command_timeout=0.2)
        assert play(env, "sleep 20") == (0.0, "failure", 1)


@pytest.mark.parametrize("how", ["execute", "verify", "kill_all"])
def test_survivors_are_told_by_an_error_of_their_own(monkeypatch, how):
    async def work(sandbox):
        session = await sandbox.create_session()
        await session.run("setsid sleep 60 > /dev/null 2>&1 &")
        with pytest.raises(AgentFault, match="survived SIGKILL"):
            if how == "execute":
                await session.close()
                await sandbox.execute("setsid sleep 60 > /dev/null 2>&1 &")
            elif how == "verify":
                await sandbox.verify("echo unreached")
            else:
                await sandbox.kill_all()

    with changed_zygote(monkeypatch, DEATHS_TOO_SLOW):
        inside(make_config("namespaces"), work)


@pytest.mark.parametrize("fill", [FILL, FILL + python(MEMORY), python(MEMORY)])
def test_memory_filled_before_the_verifier_is_the_agents_failure(fill):
    needs("namespaces", "memory")
    config = make_config("namespaces", memory_mb=32, disk_mb=31)
    env = make("terminal/find", sandbox_config=config)
    assert play(env, fill, "head -c 1G /dev/zero > x")[:2] == (0.0, "failure")


@pytest.mark.parametrize("script", ["kill -9 $$", "echo 1 | kill -9 $$"])
def test_a_verifier_that_is_killed_is_the_agents_failure(script):
    task = dataclasses.replace(make_task("count", 3), verifier=script)
    env = TerminalEnv(task, make_config("namespaces"))
    assert play(env)[:2] == (0.0, "failure")


def test_the_end_of_a_sandbox_changes_no_ending(monkeypatch):
    """Its end can be made slow, and then `stop` fails."""

    async def stop(self):
        await original(self)
        raise SandboxStartError("the sandbox did not end within 30 s")

    original = Sandbox.stop
    monkeypatch.setattr(Sandbox, "stop", stop)
    env = TerminalEnv("count/3", make_config("namespaces"))
    env.reset()
    _, reward, _, _, info = env.step("done")
    assert (reward, info["ending"]) == (0.0, "failure")


def test_more_sessions_and_commands_than_allowed_are_the_callers_doing():
    async def work(sandbox):
        for _ in range(8):
            await sandbox.create_session()
        with pytest.raises(AgentFault, match="at most 8 sessions"):
            await sandbox.create_session()
        jobs = [await sandbox.spawn("sleep 9") for _ in range(17)]
        with pytest.raises(AgentFault, match="16 commands are running"):
            await jobs[-1].wait()

    inside(make_config("namespaces"), work)


def test_a_first_command_that_cannot_start_is_the_machines_fault(monkeypatch):
    async def work(sandbox):
        with pytest.raises(SandboxStartError, match="division"):
            await sandbox.execute("true")

    config = make_config("namespaces")  # the machine is probed before it fails
    with changed_zygote(
        monkeypatch, "from host import linux; linux.install_filter = lambda _: 1/0"
    ):
        inside(config, work)
