"""One Docker sandbox from its start to its end: what .ci/run does wherever a dockerd can be had.

The engine's other tests take minutes (make test-all).
"""

import pytest

from envs.rock.tiers import GUARANTEES

pytestmark = [pytest.mark.slow, pytest.mark.docker]


def test_a_container_works_enforces_all_and_tells_of_what_it_refused(inside):
    async def work(sandbox):
        await sandbox.write_file("f", "kept")
        result = await sandbox.execute(
            "cat f; echo x > /usr/x; (echo > /dev/tcp/169.254.169.254/80) && echo REACHED; exit 3"
        )
        async with await sandbox.create_session() as session:
            state = [(await session.run(command)).stdout for command in ("cd /tmp", "pwd")]
        verdict = await sandbox.verify(
            "cat f $VERIFIER_FILES/secret", files={"secret": b" and graded"}
        )
        return sandbox.guarantees, result, state, verdict, await sandbox.denials()

    guarantees, result, state, verdict, denials = inside(work)
    assert guarantees == set(GUARANTEES)
    assert (result.stdout, result.exit_code, result.network_denials) == (
        "kept",
        3,
        1,
    ) and "Read-only file system" in result.stderr
    assert (
        state == ["", "/tmp\n"]
        and verdict.stdout == "kept and graded"
        and [(one.destination, one.port) for one in denials] == [("169.254.169.254", 80)]
    )


def test_a_verifier_sees_its_tools_and_the_agent_does_not(inside, tmp_path):
    (tmp_path / "tool").write_text("measured\n")
    for place in (tmp_path, *tmp_path.parents[:-1]):
        place.chmod(place.stat().st_mode | 0o055)

    async def work(sandbox):
        grade = 'cat "$VERIFIER_TOOLS/tool"; echo x > "$VERIFIER_TOOLS/new" || echo no'
        return (await sandbox.verify(grade)).stdout, (await sandbox.execute("ls /run/tools")).stdout

    assert inside(work, verifier_tools=str(tmp_path)) == ("measured\nno\n", "")
