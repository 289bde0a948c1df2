"""Hostile commands: the verifier stays out of reach, and output forges nothing."""

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
