"""A session is the shell that it claims to be: the same scripts in it and in a real bash."""

import asyncio
import itertools
import os
import subprocess
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from envs.rock import Sandbox, SandboxConfig, SyncSandbox, probe
from envs.rock.docker import scripts
from envs.rock.host.shell import Frame
from tests.envs.rock.service import running
from tests.processes import open_files

SNIPPETS = (
    "echo hi",
    "false",
    "(exit 7)",
    "echo $?",
    "continue",
    "break 2",
    "for i in 1 2; do continue; done; echo $i",
    "x=5",
    "echo $x ${y-unset} $#",
    "declare -i y=3+4",
    "export y=text; bash -c 'echo $y'",
    "mkdir -p d && cd d",
    "cd ..",
    'echo "${PWD##*/}"',
    "read() { echo read; }; eval() { :; }; printf() { :; }",
    "mapfile() { :; }; test() { :; }; trap() { :; }",
    "builtin() { :; }; set() { :; }; shopt() { :; }",
    "command() { :; }; exit() { :; }; return() { :; }",
    "unset() { :; }",
    "f() { local x=9; return 4; }; f",
    "return 3",
    "local q",
    "set -x",
    "set +x",
    "set -u",
    "set -f; echo *",
    "set -o pipefail; false | true",
    "shopt -s expand_aliases; alias ll='echo alias' eval=false printf=false",
    "ll 1",
    "alias builtin=false; shopt -s extglob nullglob failglob",
    "- ls",
    "-n",
    "--help",
    "echo 'unfinished",
    "if",
    "}",
    "cat <<E\nhi\nE",
    "cat <<E\nno end",
    "echo a \\",
    "# only a remark",
    "",
    "IFS=0123456789; PS4=; PATH=$PATH",
    "echo one\necho two; false",
    "exec 5>&1; echo five >&5",
    "sleep 0 & wait $!; echo waited",
    "trap 'echo T' USR1; kill -USR1 $BASHPID",
    "exit 3",
    "exec bash -c 'exit 9'",
    "set -e; false || true",
    "echo ${nope:?gone}",
    "readonly r=1; r=2; echo after",
    "[[ a == b ]]",
    "no_such_program",
)

# Not whole: a shell that reads a script would take the next lines for more of them.
BROKEN = ("echo 'unfinished", "if", "}", "cat <<E\nno end", "echo a \\")

# Their code depends on who reads them: a file, -c or eval.
LOOSE = (*BROKEN, "echo ${nope:?gone}", "echo $x ${y-unset} $#")


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    tier = request.param
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")
    with SyncSandbox(SandboxConfig(isolation="best_available", tier=tier)) as running:
        yield running


@pytest.fixture(scope="module")
def anywhere():
    """A sandbox of the best tier, for what does not depend on the tier."""
    if (report := probe()).tier is None:
        pytest.skip(f"no sandbox here: {report.missing[0].reason}")
    with SyncSandbox(SandboxConfig(isolation="best_available")) as running:
        yield running


BELOW = "a/" * 8 + "work"  # so that `cd ..` leads to the same name in both
_numbers = itertools.count()


def in_bash(commands: list[str], directory) -> tuple[list[tuple[str, int]], int | None]:
    """Run commands one by one in a real bash; return (stdout, exit code) of each that came back.

    The second value is the shell's own exit code if a command ended it. The lines in between use
    no builtin and no function, so that the commands may redefine all of them.
    """
    lines = []
    for number, command in enumerate(commands):
        (directory / f"{number}").write_text(command)
        lines.append(f". {directory}/{number}" if command in BROKEN else command)
        lines.append(
            "{ ROCK_CODE=$?; /usr/bin/printf '\\0%s\\0' \"$ROCK_CODE\";"
            ' /bin/sh -c "exit $ROCK_CODE"; } 2>/dev/null'
        )
    script = directory / "script"
    script.write_text("\n".join([*lines, "{ ROCK_LAST=; } 2>/dev/null", "exec true"]))
    run = subprocess.run(
        ["/bin/bash", "--noprofile", "--norc", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=directory,
        env={"PATH": os.environ["PATH"]},
        timeout=60,
    )
    *pairs, last = run.stdout.decode().split("\0")
    results = [(pairs[n], int(pairs[n + 1])) for n in range(0, len(pairs), 2)]
    if len(results) == len(commands):
        return results, None
    return [*results, (last, run.returncode)], run.returncode


def in_session(commands: list[str], sandbox) -> tuple[list[tuple[str, int]], int | None]:
    """Run commands in a session, in a directory of their own; see in_bash."""
    results = []
    with sandbox.create_session() as session:
        place = f"w{next(_numbers)}/{BELOW}"
        assert session.run(f"mkdir -p {place} && cd {place}").exit_code == 0
        for command in commands:
            result = session.run(command, timeout=60)
            results.append((result.stdout, result.exit_code))
            if session.ended:
                return results, result.exit_code
    return results, None


def loosely(commands, results):
    """Return the results with only success or failure for LOOSE commands."""
    return [
        (out, bool(code) if command in LOOSE else code)
        for command, (out, code) in zip(commands, results, strict=False)
    ]


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(commands=st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=7))
def test_a_session_behaves_as_bash(anywhere, tmp_path_factory, commands):
    directory = tmp_path_factory.mktemp("bash") / BELOW
    directory.mkdir(parents=True)
    expected, ended = in_bash(commands, directory)
    results, session_ended = in_session(commands, anywhere)
    assert loosely(commands, results) == loosely(commands, expected)
    assert (session_ended is None) == (ended is None)


def test_nothing_of_the_frame_shows_and_state_that_it_puts_aside_comes_back(sandbox):
    with sandbox.create_session() as session:
        first = session.run("echo $LINENO\nno_such_program")
        assert first.stdout == "1\n" and first.stderr.startswith("bash: line 2: no_such_program")
        session.run("set -x")
        for _ in range(2):
            traced = session.run("echo hi")
            assert traced.stdout == "hi\n" and traced.stderr.lstrip("+") == " echo hi\n"
        session.run("set +x; trap 'echo D' DEBUG; trap 'echo \"E\n\"' ERR")
        assert session.run("echo hi").stdout == "D\nhi\n"
        assert session.run("! :; (exit 3)").exit_code == 3
        session.run("trap - DEBUG")
        assert session.run("false").stdout == "E\n\n"
        assert session.run("trap - ERR; false").exit_code == 1
        assert session.run("echo $?").stdout == "1\n"
        assert session.run("break").stderr.count("only meaningful in a") == 1
        assert session.run("echo well").stdout == "well\n"


def test_no_exit_code_can_be_written_for_the_running_command_or_a_later_one(sandbox):
    every = "for n in {3..255}; do \\printf '0\\0' >&$n; done 2>/dev/null"
    with sandbox.create_session() as session:
        slow = session.run(f"{every}; touch written; sleep 600", timeout=1)
        assert slow.timed_out and slow.exit_code == 137
        assert session.run("rm written").exit_code == 0
        session.run(f"(until [ -e go ]; do sleep 0.02; done; {every}; touch written) & true")
        late = "touch go; until [ -e written ]; do sleep 0.02; done; (exit 6)"
        assert session.run(late).exit_code == 6
        assert session.run("(exit 7)").exit_code == 7


def test_commands_that_begin_with_a_dash_are_commands(sandbox):
    for command in ("- ls", "-n", "--help", "--"):
        result = sandbox.execute(command)
        assert result.exit_code == 127 and "command not found" in result.stderr, result


def test_a_flood_in_an_idle_session_is_not_read(anywhere):
    with anywhere.create_session() as session:
        session.run("yes & true")
        time.sleep(0.1)  # what came with the command has been read
        before = os.times()
        time.sleep(0.5)
        after = os.times()
        spent = after.user + after.system - before.user - before.system
        assert spent < 0.2  # reading as fast as it is written takes all of the time
        session.run("kill %1; wait")
        assert session.run("echo well").stdout == "well\n"


@pytest.mark.parametrize("seconds", [0.0, 0.005])
def test_a_session_start_that_is_cancelled_at_an_admin_leaves_none(seconds, tmp_path):
    if probe().tier is None:
        pytest.skip("no sandbox here")

    async def work():
        async with running.admin(tmp_path) as site, Sandbox(site.config()) as sandbox:
            for _ in range(12):  # more than a sandbox may have
                starting = asyncio.create_task(sandbox.create_session())
                await asyncio.sleep(seconds)
                starting.cancel()
                (session,) = await asyncio.gather(starting, return_exceptions=True)
                if not isinstance(session, BaseException):  # a quick machine had started it
                    await session.close()
            for _ in range(1500):
                if not (left := (await sandbox.get_status()).sessions):
                    break
                await asyncio.sleep(0.02)
            return left

    assert asyncio.run(asyncio.wait_for(work(), 120)) == 0


def test_a_cancelled_session_start_leaves_no_session_and_no_descriptor():
    if probe().tier is None:
        pytest.skip("no sandbox here")

    async def work():
        async with Sandbox(SandboxConfig(isolation="best_available")) as sandbox:
            await sandbox.execute("true")
            before = open_files()
            for _ in range(12):  # more than a sandbox may have
                starting = asyncio.create_task(sandbox.create_session())
                await asyncio.sleep(0)
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            async with await sandbox.create_session() as session:
                sessions = (await sandbox.get_status()).sessions
                said = (await session.run("echo well")).stdout
            return (open_files() - before).total(), sessions, said

    assert asyncio.run(asyncio.wait_for(work(), 180)) == (0, 1, "well\n")


def test_the_script_of_a_docker_session_reports_and_marks(tmp_path):
    """The shell of that backend, run here: reports to a pipe, marks to both streams."""
    door = tmp_path / "door"
    os.mkfifo(door)
    shell = subprocess.Popen(
        ["/bin/bash", "-c", scripts.SESSION, "sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shell.stdin.write(f"{door}\n".encode())
    shell.stdin.flush()
    frame = Frame(scripts.SESSION_REPORTS, scripts.CHILDREN)
    with open(door, "rb", buffering=0) as reports:
        assert reports.read(100).split() == [str(shell.pid).encode(), b"\0"]

        def run(command: str) -> tuple[int, bytes]:
            shell.stdin.write(frame.records(command.encode()))
            shell.stdin.flush()
            while (report := frame.receive(reports.read(1000))) is None:
                continue
            return report

        assert run("x=5; read() { :; }; break; (exit 4)") == (4, b"")
        assert run("echo $? $x >&2; sleep 20 & set -x")[1].strip().isdigit()
        assert run("kill %1; wait; ls /proc/self/fd | wc -l; head -c 1")[0] == 0
        shell.stdin.write(scripts.write_mark(b"<mark>"))
        out, err = shell.communicate()
    assert out == b"4\n<mark>"  # the descriptors of an ls
    assert b"4 5\n" in err and err.endswith(b"<mark>") and b"ROCK" not in err
