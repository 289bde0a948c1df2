"""What a command sees, how its end is told, and what stays of it: the same in both tiers unless a
test says otherwise.
"""

import asyncio
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from envs.rock import (
    IsolationError,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    SandboxStartError,
    probe,
)
from envs.rock.host.fenced import WITHOUT_ETC
from tests.envs.rock.waiting import until_exists
from tests.paths import ROOT


@pytest.fixture(params=["namespaces", "landlock"])
def config(request):
    def make(**fields):
        return SandboxConfig(isolation="best_available", tier=request.param, **fields)

    if (report := probe(tier=request.param)).tier is None:
        pytest.skip(f"no {request.param} tier here: {report.missing[0].reason}")
    return make


def inside(config: SandboxConfig, work):
    """Run `work(sandbox)` in a fresh sandbox."""

    async def run():
        async with Sandbox(config) as sandbox:
            return await work(sandbox)

    return asyncio.run(asyncio.wait_for(run(), 180))


def execute(config: SandboxConfig, command: str, **options):
    return inside(config, lambda sandbox: sandbox.execute(command, **options))


@pytest.mark.parametrize(
    "command, code",
    [
        ("true", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("no-such-program", 127),
        ("kill -TERM $$", 143),
        ("bash -c 'kill -KILL $$'", 137),
        ("sed", 1),
    ],
)
def test_exit_codes_are_those_of_the_command(config, command, code):
    assert execute(config(), command).exit_code == code


def test_output_streams_are_kept_apart(config):
    result = execute(config(), "echo out; echo err >&2")
    assert (
        result.stdout,
        result.stderr,
        result.truncated,
        result.timed_out,
        result.limits_hit,
    ) == ("out\n", "err\n", False, False, ())


def test_files_stay_and_processes_directory_and_variables_do_not(config):
    async def work(sandbox):
        await sandbox.execute("echo kept > file; mkdir sub; cd sub; X=1; export X; sleep 1000 &")
        return await sandbox.execute(
            'cat file; basename "$PWD"; echo "[$X]"; cat /proc/[0-9]*/comm | grep sleep; jobs'
        )

    assert inside(config(), work).stdout == "kept\nworkspace\n[]\n"


def test_a_background_process_does_not_hold_the_command_open(config):
    result = execute(config(), "sleep 1000 & setsid sleep 1000 & echo done")
    assert (result.stdout, result.exit_code) == ("done\n", 0)


def test_the_environment_holds_nothing_of_the_host(config, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret-of-the-host")
    result = execute(
        config(env={"COLOR": "red"}),
        "env; tr '\\0' '\\n' < /proc/1/environ",
        env={"SHAPE": "round"},
    )
    assert "secret-of-the-host" not in result.stdout
    names = {line.split("=")[0] for line in result.stdout.splitlines()}
    assert (
        {"COLOR", "SHAPE", "PATH", "HOME"}
        <= names
        <= {"COLOR", "SHAPE", "PATH", "HOME", "LANG", "PWD", "SHLVL", "_", "TMPDIR", "OLDPWD"}
        | WITHOUT_ETC.keys()
    )


def test_there_is_no_input_to_wait_for(config):
    assert execute(config(), "cat; read x; echo $?").stdout == "1\n"


def test_a_closed_pipe_ends_its_writer(config):
    result = execute(config(), "yes | head -1; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == ("y\n141\n", "")


@pytest.mark.parametrize("command", ["echo 'a\0b'", "x" * 200_000])
def test_a_command_that_cannot_be_passed_is_answered_like_a_failed_one(config, command):
    result = execute(config(), command)
    assert result.exit_code == 126 and result.stderr.startswith("bash: the command")


@pytest.mark.parametrize(
    "text",
    ["\u00e9\u4e16\u754c" * 5000, "\x01" * 90_000, "line\n" * 15_000],
    ids=["unicode", "control", "lines"],
)
def test_long_commands_of_any_characters_arrive_whole(config, text):
    result = execute(config(max_output_bytes=1 << 20), f"cat <<'END'\n{text}\nEND")
    assert result.stdout == text + "\n"


def test_output_that_is_not_text_is_kept_readable(config):
    result = execute(config(), r"printf 'a\0b\377\xc3c'")
    assert result.stdout == "a\0b\ufffd\ufffdc"


def test_long_output_is_cut_and_said_to_be_while_the_exit_code_stays_true(config):
    result = execute(
        config(max_output_bytes=1000), "head -c 5000000 /dev/zero | tr '\\0' x; exit 3"
    )
    assert (result.stdout, result.truncated, result.exit_code) == ("x" * 1000, True, 3)


def test_ordinary_tools_work(config):
    script = """set -e
    printf '3\\n1\\n2\\n' | sort | awk '{s+=$1} END {print s}'
    python3 -c 'import json, math, re; print(json.dumps([1]))'
    mkdir -p d && cd d && echo x > f && ln -s f l && cat l && find . -name 'f*' | wc -l
    diff <(echo a) <(echo a) && t=$(mktemp) && echo ok > $t && cat $t
    chmod 750 f && stat -c %a f && tar cf a.tar f && tar tf a.tar &&
        sed -i s/x/y/ f && cat f && grep -c y f"""
    result = execute(config(), script)
    assert (result.stdout.split(), result.stderr) == (
        ["6", "[1]", "x", "1", "ok", "750", "f", "y", "1"],
        "",
    )


def test_the_verifier_sees_the_files_in_a_clean_environment(config):
    async def work(sandbox):
        await sandbox.execute(
            "echo 42 > answer; echo 'echo hacked; exit 0' > .bashrc; echo 'raise SystemExit(9)' >"
            " json.py"
        )
        return await sandbox.verify(
            '[ "$(cat answer)" = "$(cat $VERIFIER_FILES/want)" ] && echo "[$COLOR]" && python3 -c'
            ' "import json; print(1)"; exit $((7 + $?))',
            files={"want": b"42\n"},
        )

    result = inside(config(env={"COLOR": "red"}), work)
    assert (result.stdout, result.exit_code) == ("[]\n1\n", 7)


def test_verifiers_see_their_tools_read_only_and_the_agent_sees_none(config, tmp_path):
    tools = tmp_path / "tools"
    (tools / "below").mkdir(parents=True)
    (tools / "below" / "tool.py").write_text("print('measured')\n")
    for place in (tools, *tools.parents[:-1]):
        place.chmod(place.stat().st_mode | 0o055)

    async def work(sandbox):
        before = await sandbox.execute(
            f"echo $VERIFIER_TOOLS; ls /run/tools {tools}; head /proc/*/cwd/below/tool.py;"
            " (while :; do ls /run/tools >> seen 2> /dev/null; sleep 0.01; done) & sleep 0.1"
        )
        grade = (
            'python3 -I "$VERIFIER_TOOLS/below/tool.py"; echo x > "$VERIFIER_TOOLS/new" || echo no'
        )
        verdicts = [(await sandbox.verify(grade)).stdout for _ in range(2)]
        after = await sandbox.execute(f"cat seen; ls /run/tools {tools} /tmp")
        return before.stdout + after.stdout, verdicts

    seen, verdicts = inside(config(verifier_tools=str(tools)), work)
    assert verdicts == ["measured\nno\n"] * 2
    assert "below" not in seen and "measured" not in seen


def test_tools_that_are_not_there_are_named(config):
    with pytest.raises(SandboxStartError, match="/nowhere/tools"):
        inside(config(verifier_tools="/nowhere/tools"), lambda sandbox: sandbox.execute("true"))


def test_a_verifier_may_be_long_and_holds_all_its_lines(config):
    script = "#!/bin/bash\n# a comment first\n" + "x=$((x + 1))\n" * 30_000 + "echo $x"
    assert inside(config(), lambda sandbox: sandbox.verify(script)).stdout == "30000\n"


def test_the_time_limit_is_kept_and_said(config):
    result = execute(config(), "echo before; sleep 1000", timeout=1)
    assert (result.stdout, result.exit_code, result.timed_out, result.limits_hit) == (
        "before\n",
        137,
        True,
        ("timeout",),
    )


def test_kill_all_ends_a_running_command_and_keeps_the_files(config):
    async def work(sandbox):
        running = asyncio.create_task(sandbox.execute("echo 1 > s; mv s started; sleep 1000"))
        while not await _exists(sandbox, "started"):
            await asyncio.sleep(0.01)
        await sandbox.kill_all()
        return (await running).limits_hit, await sandbox.read_file("started")

    assert inside(config(), work) == (("killed",), b"1\n")


async def _exists(sandbox, path):
    try:
        await sandbox.read_file(path)
    except SandboxError:
        return False
    return True


def test_a_cancelled_command_leaves_the_sandbox_usable(config):
    async def work(sandbox):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.execute("while :; do echo . >> tick; done"), 1)
        first = await sandbox.execute("wc -c < tick; sleep 0.1")
        return first.stdout, (await sandbox.execute("wc -c < tick")).stdout

    first, second = inside(config(), work)
    assert first == second != ""


def test_what_a_cancelled_command_started_does_not_run_beside_the_next(config):
    async def work(sandbox):
        beat = "while :; do echo . >> tick; sleep 0.01; done"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.execute(f"setsid bash -c '{beat}' & {beat}"), 1)
        counted = await sandbox.execute("wc -c < tick; sleep 0.3; wc -c < tick")
        return counted.stdout.split()

    first, second = inside(config(), work)
    assert first == second


def test_commands_given_at_once_run_one_after_the_other(config):
    async def work(sandbox):
        await asyncio.gather(
            *(
                sandbox.execute("x=$(cat n 2>/dev/null || echo 0); sleep 0.01; echo $((x + 1)) > n")
                for _ in range(8)
            )
        )
        return await sandbox.read_file("n")

    assert inside(config(), work) == b"8\n"


def test_a_stopped_sandbox_refuses_work_and_stops_again_quietly(config):
    async def work():
        sandbox = Sandbox(config())
        with pytest.raises(SandboxClosedError):
            await sandbox.execute("true")
        await sandbox.start()
        await sandbox.stop()
        await sandbox.stop()
        with pytest.raises(SandboxClosedError):
            await sandbox.execute("true")

    asyncio.run(asyncio.wait_for(work(), 180))


def test_stopping_ends_a_command_that_runs(config):
    async def work():
        sandbox = Sandbox(config())
        await sandbox.start()
        running = asyncio.create_task(sandbox.execute("touch begun; sleep 1000"))
        await until_exists(sandbox, "begun")
        await asyncio.gather(sandbox.stop(), sandbox.stop())
        return await asyncio.gather(running, return_exceptions=True)

    (outcome,) = asyncio.run(asyncio.wait_for(work(), 180))
    assert isinstance(outcome, SandboxClosedError) or outcome.limits_hit == ("killed",)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"isolation": "some"}, "required, best_available"),
        ({"tier": "docker"}, "namespaces, landlock"),
        ({"isolation": "required", "tier": "landlock"}, "does not give the guarantees"),
        ({"pids": 0}, "pids is 0"),
        ({"disk_mb": 300}, "leaves no memory"),
        ({"env": {"A=B": "c"}}, "A=B"),
    ],
)
def test_an_impossible_config_is_refused_before_anything_starts(fields, message):
    with pytest.raises(ValueError, match=message):
        SandboxConfig(**fields)


def test_required_isolation_is_never_silently_weaker():
    report = probe("required")
    lacking = [item for item in report.missing if item.guarantee != "cpu"]

    async def start():
        async with Sandbox(SandboxConfig(isolation="required")) as sandbox:
            return sandbox.tier, sandbox.guarantees

    if lacking:
        with pytest.raises(IsolationError, match="remedy"):
            asyncio.run(start())
    else:
        tier, guarantees = asyncio.run(start())
        assert (
            tier == "namespaces"
            and {"memory", "pids", "network", "filesystem", "disk", "processes"} <= guarantees
        )


TELL_TIME = """
import asyncio, sys
from envs.rock import Sandbox, SandboxConfig
ASK = "date -d '2024-01-01 00:00' '+%Z %s'; TZ=JST-9 date -d '2024-01-01 00:00' +%s"
async def main():
    config = SandboxConfig(isolation="best_available", tier=sys.argv[1])
    async with Sandbox(config) as sandbox:
        print((await sandbox.execute(ASK)).stdout, (await sandbox.verify(ASK)).stdout)
asyncio.run(main())
"""


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_the_hosts_time_zone_is_not_the_sandboxs(tier, tmp_path):
    if probe(tier=tier).tier is None:
        pytest.skip(f"no {tier} tier here")
    tokyo = pathlib.Path("/usr/share/zoneinfo/Asia/Tokyo")
    if os.geteuid() or not tokyo.exists():
        pytest.skip("the host's zone cannot be changed here")
    shutil.copytree("/etc", tmp_path / "etc", symlinks=True, ignore_dangling_symlinks=True)
    (tmp_path / "etc/localtime").unlink(missing_ok=True)
    shutil.copy(tokyo, tmp_path / "etc/localtime")
    program = shlex.join([sys.executable, "-c", TELL_TIME, tier])
    host = f"mount --bind {tmp_path}/etc /etc && date +%Z && exec {program}"
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", host],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.split() == ["JST", *["UTC", "1704067200", "1704034800"] * 2], run.stderr
