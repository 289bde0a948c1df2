"""What a place of work promises, held by this machine and by a sandbox alike."""

import asyncio
import os
import subprocess
import sys
import time

import pytest

from rome.agent.iflow.places.host_shell import find_processes
from rome.agent.iflow.places.host_workspace import HostWorkspace
from rome.agent.iflow.places.output import HEAD_CHARACTERS, TAIL_CHARACTERS, OutputKeeper, decode
from rome.agent.iflow.places.workspace import WorkspaceError
from tests.rome.agent.iflow.places import KINDS, work

pytestmark = pytest.mark.timeout(240)

# `sleep 71{OWN}` is found among this machine's processes: no other run of these tests has it. It is
# longer than a test may take, so one that waits for it fails.
OWN = f"0.{os.getpid()}"


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_shell_keeps_directory_variables_and_status(kind, tmp_path):
    async def body(workspace):
        await workspace.execute(
            "mkdir -p a/b; cd a/b; X='one two'; f() { echo \"f:$X\"; }", timeout=60
        )
        said = await workspace.execute("pwd; f; echo bad >&2; (exit 7)", timeout=60)
        assert said.output == f"{workspace.root}/a/b\nf:one two\nbad\n"
        assert said.exit_code == 7
        assert (await workspace.execute("echo $?", timeout=60)).output == "7\n"
        assert workspace.directory == f"{workspace.root}/a/b"
        await workspace.execute("cd ../..; PWD=/elsewhere", timeout=60)
        assert workspace.directory == workspace.root

    work(kind, tmp_path, body)


@pytest.mark.parametrize("command", ["exit 3", "echo bye; kill -9 $$", "exec true"])
def test_a_command_that_ends_its_shell_leaves_a_working_one(kind, tmp_path, command):
    async def body(workspace):
        await workspace.execute("cd /; X=1", timeout=60)
        ended = await workspace.execute(command, timeout=60)
        assert "the shell ended" in ended.note
        assert ended.exit_code == {"exit 3": 3, "exec true": 0}.get(command, 137)
        after = await workspace.execute('echo "$PWD:$X"', timeout=60)
        assert (after.output, after.note) == (f"{workspace.root}:\n", "")

    work(kind, tmp_path, body)


def test_a_command_at_its_limit_is_ended_with_its_children_and_the_shell_goes_on(kind, tmp_path):
    async def body(workspace):
        await workspace.execute(f"X=kept; sleep 77{OWN} & disown", timeout=60)
        command = f"(setsid sleep 78{OWN} &) ; echo on; sleep 79{OWN}"
        late = await workspace.execute(command, timeout=1)
        assert (late.exit_code, late.note) == (None, "")
        assert late.output.startswith("on\n")  # bash may add that it saw a child killed
        after = await workspace.execute(f"echo $X; pgrep -af '^sleep 7[789]{OWN}'", timeout=60)
        assert after.output.splitlines()[0] == "kept"
        assert "sleep 79" not in after.output
        assert kind != "host" or "sleep 78" not in after.output
        if kind == "host" or workspace._sandbox.tier != "landlock":
            assert "sleep 77" in after.output  # of an earlier command

    work(kind, tmp_path, body)


def test_a_shell_that_does_not_come_back_is_replaced(kind, tmp_path):
    async def body(workspace):
        late = await workspace.execute("while true; do :; done", timeout=0.3)
        assert late.exit_code is None
        assert "the shell ended" in late.note
        assert (await workspace.execute("echo on", timeout=60)).output == "on\n"

    work(kind, tmp_path, body)


def test_nothing_waits_for_input(kind, tmp_path):
    async def body(workspace):
        said = await workspace.execute('cat; read line; echo "$?[$line]"', timeout=60)
        assert said.output == "1[]\n"

    work(kind, tmp_path, body)


def test_children_in_the_background_do_not_hold_a_command(kind, tmp_path):
    async def body(workspace):
        late = "(until [ -e go ]; do sleep 0.05; done; echo late)"
        said = await workspace.execute(f"{late} & echo now", timeout=60)
        assert said.output == "now\n"
        assert "late" in (await workspace.execute("touch go; wait", timeout=60)).output

    work(kind, tmp_path, body)


def test_bytes_that_are_no_text_and_colours_do_no_harm(kind, tmp_path):
    async def body(workspace):
        said = await workspace.execute(
            r"printf '\377\000a\033[31mred\033[0m\n10%%\r99%%\r\n'; head -c 300 /dev/urandom",
            timeout=9,
        )
        assert "red\n99%\n" in said.output
        assert "\x1b[31m" not in said.output
        assert (await workspace.execute("echo on", timeout=60)).output == "on\n"

    work(kind, tmp_path, body)


def test_long_output_keeps_head_and_tail_and_the_whole_in_a_file(kind, tmp_path):
    async def body(workspace):
        said = await workspace.execute("seq 1 200000", timeout=30)
        assert said.output.startswith("1\n2\n") and said.output.endswith("199999\n200000\n")
        assert len(said.output) < HEAD_CHARACTERS + TAIL_CHARACTERS + 300
        assert said.file and said.file in said.output
        whole = await workspace.read(said.file)
        assert whole == b"".join(b"%d\n" % n for n in range(1, 200001))
        found = await workspace.execute(f"grep -n '^123456$' {said.file}", timeout=60)
        assert found.output == "123456:123456\n"  # the shell reads it as well

    work(kind, tmp_path, body)


def test_output_without_end_is_ended(kind, tmp_path):
    async def body(workspace):
        said = await workspace.execute("echo first; yes", timeout=60)
        assert said.output.startswith("first\ny\n")
        assert said.exit_code == 137 and "ended: it wrote" in said.note
        assert (await workspace.execute("echo on", timeout=60)).output == "on\n"

    work(kind, tmp_path, body)


@pytest.mark.slow
def test_a_hundred_megabytes_cost_no_memory_here(kind, tmp_path):
    async def body(workspace):
        said = await workspace.execute("head -c 100000000 /dev/zero | tr '\\0' x", timeout=60)
        assert len(said.output) < 40_000
        assert "ended: it wrote" in said.note

    work(kind, tmp_path, body)


@pytest.mark.parametrize("command", ["x" * 200_000, "a\0b"])
def test_a_command_that_no_program_can_be_given_is_refused(kind, tmp_path, command):
    async def body(workspace):
        try:
            said = await workspace.execute(command, timeout=60)
            assert said.exit_code == 126 and "bash: the command" in said.output
        except WorkspaceError as error:
            assert "the command has" in str(error)
        assert (await workspace.execute("echo on", timeout=60)).output == "on\n"

    work(kind, tmp_path, body)


async def begin_to_sleep(workspace):
    """Return the task of a command that sleeps for longer than this test may take, once it runs."""
    command = f"touch begun; sleep 66{OWN}"
    running = asyncio.ensure_future(workspace.execute(command, timeout=900))
    while await workspace.stat("begun") is None:
        await asyncio.sleep(0.02)
    return running


def test_a_cancelled_command_is_ended_at_once(kind, tmp_path):
    async def body(workspace):
        running = await begin_to_sleep(workspace)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        # The shell answers, so it does not wait for what it ran.
        after = await workspace.execute(f"pgrep -af '^sleep 66{OWN}'; echo on", timeout=60)
        assert after.output == "on\n"

    work(kind, tmp_path, body)


def test_a_workspace_may_be_closed_while_a_command_is_cancelled(kind, tmp_path):
    async def body(workspace):
        running = await begin_to_sleep(workspace)
        running.cancel()
        await asyncio.sleep(0)
        await workspace.aclose()
        with pytest.raises(asyncio.CancelledError):
            await running
        # What the shell read from is not waited for: a new descriptor of that number may be.
        loop = asyncio.get_running_loop()
        for _ in range(20):
            read, _write = os.pipe()
            loop.add_reader(read, lambda: None)
            loop.remove_reader(read)

    work(kind, tmp_path, body)


def test_background_jobs_run_are_read_and_end(kind, tmp_path):
    async def body(workspace):
        await workspace.execute("mkdir sub; cd sub", timeout=60)
        waiting = "until [ -e go ]; do sleep 0.05; done"
        job = await workspace.spawn(f"pwd; echo one; {waiting}; echo two; exit 5")
        said = ""
        while "one" not in said:
            said += await job.read()
        assert said == f"{workspace.root}/sub\none\n"
        assert job.is_running and job.exit_code is None
        assert await job.read() == ""
        await workspace.write("sub/go", b"")
        assert await job.wait() == 5
        assert (await job.read(), job.is_running, job.exit_code) == ("two\n", False, 5)
        assert workspace.jobs[job.id] is job

    work(kind, tmp_path, body)


def test_a_killed_job_takes_all_with_it(kind, tmp_path):
    async def body(workspace):
        naps = [f"sleep {number}{OWN}" for number in (62, 63, 64, 65)]
        job = await workspace.spawn(f"(setsid nohup {naps[3]} &); {naps[2]} & {naps[1]}")
        other = await workspace.spawn(naps[0])
        look = f"pgrep -af '^sleep 6[2345]{OWN}'"
        begun = f"until [ $({look} | wc -l) = 4 ]; do sleep 0.05; done"
        assert (await workspace.execute(begun, timeout=60)).exit_code == 0
        await job.kill()
        assert (job.is_running, job.exit_code) == (False, None)
        left = await workspace.execute(look, timeout=60)
        assert [line.split(maxsplit=1)[1] for line in left.output.splitlines()] == [naps[0]]
        await job.kill()
        await other.kill()

    work(kind, tmp_path, body)


@pytest.mark.slow
def test_a_job_that_floods_is_bounded(kind, tmp_path):
    async def body(workspace):
        job = await workspace.spawn("yes | head -c 20000000; echo end")
        await asyncio.wait_for(job.wait(), 60)
        said = await job.read(1000)
        assert said.endswith("end\n") and len(said) < 1200 and job.path in said

    work(kind, tmp_path, body)


def test_files_are_read_written_and_looked_at(kind, tmp_path):
    async def body(workspace):
        content = bytes(range(256)) * 300
        await workspace.write("deep/er/it's $x\n.bin", content)
        assert await workspace.read("deep/er/it's $x\n.bin") == content
        size, changed = await workspace.stat("deep/er/it's $x\n.bin")
        assert size == len(content) and abs(changed - time.time()) < 60
        await workspace.execute("chmod 750 deep/er/*", timeout=60)
        await workspace.write("deep/er/it's $x\n.bin", b"less")
        said = await workspace.execute(
            "stat -c %a deep/er/*; ls -A . deep/er | grep -c iflow", timeout=60
        )
        assert said.output == "750\n0\n"
        assert await workspace.stat("none") is None
        with pytest.raises(WorkspaceError, match="none: no such file"):
            await workspace.read("none")
        with pytest.raises(WorkspaceError, match="is a directory"):
            await workspace.read("deep")
        with pytest.raises(WorkspaceError, match="has 4 bytes, more than 3"):
            await workspace.read("deep/er/it's $x\n.bin", 3)

    work(kind, tmp_path, body)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root works on files of others")
def test_a_file_stays_its_owners(tmp_path):
    async def body(workspace):
        await workspace.write("a", b"one")
        os.chown(f"{workspace.root}/a", 12345, 23456)
        await workspace.write("a", b"two")
        status = os.stat(f"{workspace.root}/a")
        assert (status.st_uid, status.st_gid) == (12345, 23456)

    work("host", tmp_path, body)


def test_files_outside_the_project_can_be_named(kind, tmp_path):
    async def body(workspace):
        place = f"{workspace.outputs}/deep/x"
        await workspace.write(place, b"there")
        assert await workspace.read(place) == b"there"
        assert (await workspace.execute(f"cat {place}; ls", timeout=60)).output == "there"

    work(kind, tmp_path, body)


def test_no_pipe_holds_a_file_tool(kind, tmp_path):
    async def body(workspace):
        await workspace.execute("mkfifo p", timeout=60)
        for call in (workspace.read("p"), workspace.write("p", b"x"), workspace.stat("p")):
            with pytest.raises(WorkspaceError, match="no regular file"):
                await asyncio.wait_for(call, 60)

    work(kind, tmp_path, body)


def test_a_snapshot_brings_the_files_back(kind, tmp_path):
    async def body(workspace):
        await workspace.execute("echo one > a; mkdir d; echo x > d/x; chmod 600 a", timeout=60)
        kept = await workspace.snapshot()
        await workspace.execute("echo two > a; rm -r d; echo y > d; echo new > n", timeout=60)
        await workspace.restore(kept)
        said = await workspace.execute("cat a d/x; stat -c %a a; ls", timeout=60)
        assert said.output == "one\nx\n600\na\nd\n"
        with pytest.raises(WorkspaceError, match="there is no"):
            await workspace.restore("0000")

    work(kind, tmp_path, body)


def test_a_workspace_beside_has_its_own_shell_and_the_same_files_and_jobs(kind, tmp_path):
    async def body(workspace):
        other = workspace.beside()
        await workspace.execute("mkdir d; cd d; X=1", timeout=60)
        long = asyncio.ensure_future(
            workspace.execute("until [ -e go ]; do sleep 0.1; done", timeout=30)
        )
        said = await other.execute('echo "$PWD:$X"', timeout=60)  # while the first one is busy
        assert said.output == f"{workspace.root}:\n"
        await other.write("d/go", b"")
        assert (await long).exit_code == 0
        job = await other.spawn("sleep 52")
        assert workspace.jobs[job.id] is job
        kept = await workspace.snapshot()
        await other.execute("rm d/go", timeout=60)
        await workspace.restore(kept)
        assert await other.stat("d/go") is not None
        assert (await other.execute("ls d", timeout=60)).output == "go\n"
        await other.aclose()
        assert (await workspace.execute("echo on", timeout=60)).output == "on\n"

    work(kind, tmp_path, body)


# -- this machine only


def test_a_link_cannot_lead_out_of_the_project(tmp_path):
    async def body(workspace):
        (tmp_path / "secret").write_text("s")
        os.symlink(tmp_path, f"{workspace.root}/out")
        for call in (
            workspace.read("out/secret"),
            workspace.write("out/new", b""),
            workspace.stat("out/x"),
        ):
            with pytest.raises(WorkspaceError, match="outside the project"):
                await call
        assert await workspace.read("../secret") == b"s"  # named as it is, for the policy to see

    work("host", tmp_path, body)


def test_nothing_survives_the_end(tmp_path):
    async def body(workspace):
        await workspace.execute("(setsid sleep 61 &); sleep 60 &", timeout=60)
        await workspace.spawn("sleep 59")
        return workspace._mark

    mark = work("host", tmp_path, body)
    assert find_processes(mark) == {}


def test_a_new_process_ends_what_a_killed_one_left(tmp_path):
    async def body(workspace):
        await workspace.execute("(setsid sleep 58 &)", timeout=60)
        assert find_processes(workspace._mark)
        HostWorkspace(workspace.root, str(tmp_path / "session"))
        assert not find_processes(workspace._mark)

    work("host", tmp_path, body)


def test_what_a_killed_agent_left_is_ended_when_it_is_taken_up_again(tmp_path):
    program = """
import asyncio, sys
from rome.agent.iflow.places.host_workspace import HostWorkspace

async def main():
    workspace = HostWorkspace(sys.argv[1], sys.argv[2])
    await workspace.spawn("trap '' PIPE; while true; do echo x; sleep 0.1; done")
    print(workspace._mark, flush=True)
    await workspace.execute("setsid sleep 540", timeout=600)

asyncio.run(main())
"""
    arguments = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "session")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as agent:
        mark = agent.stdout.readline().strip()
        deadline = time.monotonic() + 60
        while len(find_processes(mark)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        agent.kill()
    assert find_processes(mark)
    HostWorkspace(str(tmp_path), str(tmp_path / "session"))
    assert find_processes(mark) == {}


def test_the_agents_own_key_is_not_in_the_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("IFLOW_apiKey", "secret")
    monkeypatch.setenv("IFLOW_API_KEY", "secret")
    monkeypatch.setenv("OTHER", "kept")

    async def body(workspace):
        assert (
            await workspace.execute("env | grep -c secret; echo $OTHER", timeout=60)
        ).output == "0\nkept\n"

    work("host", tmp_path, body)


def test_head_and_tail_meet_where_nothing_is_left_out(tmp_path):
    keeper = OutputKeeper(tmp_path / "o")
    for _ in range(10):
        keeper.write(b"x" * 2999 + b"\n")
    assert keeper.finish() == (("x" * 2999 + "\n") * 10, "")
    assert decode(b"10%\r\x1b[2K20%\r\ndone") == "20%\ndone"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["a\0b", "half \ud800 a letter"])
def test_a_text_that_is_no_path_is_named(tmp_path, kind, path):
    async def body(workspace):
        for call in (workspace.stat(path), workspace.read(path), workspace.write(path, b"x")):
            with pytest.raises(WorkspaceError, match="is no path"):
                await call

    work(kind, tmp_path, body)
