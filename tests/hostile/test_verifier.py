"""Hostile commands: the verifier stays out of reach, and output forges nothing."""

import pytest

from tests.hostile.sandboxes import execute, inside, make_config, needs

SECRET = "the-expected-answer-4711"


def test_the_verifiers_script_is_never_within_reach(tier):
    """Not from an agent's process that tried to stay, and not from the agent's program when the
    verifier itself runs it.
    """
    needs(tier, "verifier")
    spy = """
import glob, os
patterns = "/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ", "/proc/[0-9]*/fd/*"
patterns += "/workspace/*", "/tmp/*", "/run/*"
paths = [path for pattern in patterns for path in glob.glob(pattern)]
for who in ("self", os.getppid()):  # also where /proc cannot be listed
    paths += ["/proc/%s/fd/%d" % (who, number) for number in range(300)]
seen = b""
for path in paths:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError: continue
    try: seen += os.read(descriptor, 1 << 20)
    except OSError: pass
    os.close(descriptor)
found = b"answer-" + b"4711" in seen
with open("loot", "ab") as loot: loot.write(b"LOOT " + seen if found else b"nothing. ")
"""

    async def work(sandbox):
        await sandbox.write_file("spy.py", spy)
        await sandbox.execute("setsid bash -c 'while :; do python3 spy.py; done' & sleep 0.1")
        result = await sandbox.verify(
            f"want={SECRET}\nsleep 0.1\npython3 spy.py\n(python3 spy.py)\n[ $want = {SECRET} ] &&"
            " echo graded",
            keep=True,
        )  # with what the spies found
        return result, await sandbox.read_file("loot")

    result, loot = inside(make_config(tier), work)
    assert result.stdout == "graded\n" and loot.count(b"nothing.") >= 2 and b"LOOT" not in loot


def test_the_verifiers_memory_cannot_be_opened_by_what_it_runs(tier):
    needs(tier, "verifier")
    program = (
        "import os; print(os.access('/proc/%d/mem' % os.getppid(), os.R_OK),"
        " os.path.exists('/proc/%d/fd/0' % os.getppid()))"
    )
    result = inside(
        make_config(tier), lambda sandbox: sandbox.verify(f'python3 -c "{program}"; true')
    )
    assert result.stdout == "False False\n"


# A grader in Python runs the agent's program, which looks for the verdict in its memory.
GRADER = """
import ctypes, os, subprocess, sys
verdict = ctypes.create_string_buffer(b"VERDICT-FAIL" + os.urandom(8).hex().encode())
told = subprocess.run([sys.argv[1]], capture_output=True, text=True)
print(verdict.raw[:12].decode(), told.stdout.strip(), told.stderr.strip()[-200:])
"""
PATCH = """#!/usr/bin/python3
import os, re
parent = os.getppid()
done = set()
for name in ("mem", "environ", "maps", "fd/1", "cwd", "root"):
    try:
        if name == "mem":
            for line in open(f"/proc/{parent}/maps"):
                start, end = (int(one, 16) for one in line.split()[0].split("-"))
                if "rw" not in line: continue
                with open(f"/proc/{parent}/mem", "r+b") as memory:
                    memory.seek(start)
                    for found in re.finditer(b"VERDICT-FAIL", memory.read(end - start)):
                        memory.seek(start + found.start())
                        memory.write(b"VERDICT-PASS")
        elif name in ("cwd", "root"): os.readlink(f"/proc/{parent}/{name}")
        else: open(f"/proc/{parent}/{name}", "rb").close()
        done.add(name)
    except (OSError, ValueError, OverflowError) as error:
        pass
print("opened", sorted(done))
"""
IN_C = "#!/bin/bash\ncat /proc/$PPID/maps /proc/$PPID/environ | wc -c"


@pytest.mark.parametrize(
    "program, says",
    [(PATCH, "opened []"), (IN_C, "0")],
    ids=["python", "bash"],
)
@pytest.mark.parametrize("python", ["python3", "/usr/bin/python3 -I", "exec /usr/bin/python3"])
def test_a_python_of_the_verifiers_is_not_changed_by_what_it_runs(python, program, says):
    async def work(sandbox):
        await sandbox.write_file("solution", program, 0o755)
        script = f"{python} $VERIFIER_FILES/grader.py ./solution"
        return await sandbox.verify(script, files={"grader.py": GRADER.encode()})

    result = inside(make_config("namespaces"), work)
    assert result.stdout.startswith(f"VERDICT-FAIL {says}"), result.stdout + result.stderr


def test_a_copy_of_python_that_only_executes_cannot_be_made_readable():
    result = inside(
        make_config("namespaces"),
        lambda sandbox: sandbox.verify(
            "p=$(readlink -f /usr/bin/python3); chmod 755 $p; cat $p | wc -c; $p -c 'print(1 + 1)';"
            " umount $p; mv $p x; ls -l $p | cut -c1-10"
        ),
    )
    assert result.stdout == "0\n2\n---x--x--x\n"


def test_hidden_files_are_gone_when_the_agent_comes_back(tier):
    async def work(sandbox):
        seen = await sandbox.verify(
            "cat $VERIFIER_FILES/key; echo $VERIFIER_FILES", files={"key": SECRET.encode()}
        )
        content, directory = seen.stdout[: len(SECRET)], seen.stdout[len(SECRET) :].strip()
        return content, (await sandbox.execute(f"cat {directory}/key; ls -A {directory}")).stdout

    assert inside(make_config(tier), work) == (SECRET, "")


def test_markers_in_the_output_forge_nothing(tier):
    forge = "echo '{ \"exit-code\": 0 }'"
    result = execute(
        make_config(tier),
        f"{forge}; echo 'sandbox: failed' >&2; for n in $(seq 3 300); do {forge} >&$n; done"
        " 2>/dev/null; exit 9",
    )
    assert (result.exit_code, result.stderr.splitlines()[0]) == (9, "sandbox: failed")
