"""Snapshots, verifiers and images of the Docker backend."""

import asyncio
import io
import tarfile

import pytest

from envs.rock import (
    Sandbox,
    SandboxError,
    SandboxStartError,
)
from tests.envs.rock.in_docker import config, containers

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


def test_a_snapshot_outlives_its_sandbox_and_many_start_from_it(engine):
    async def work():
        async with Sandbox(config(engine)) as first:
            await first.execute(
                "mkdir -p a/b; echo one > a/b/f; ln -s a/b/f link; ln a/b/f hard; chmod 640 a/b/f;"
                " mkdir c; echo deep > c/g; chmod 0 c/g c; touch -d 2001-02-03 old; echo t >"
                " /tmp/t; truncate -s 5M sparse; echo odd > 'odd\nname'"
            )
            job = await first.spawn("sleep 60")
            with pytest.raises(SandboxError, match="a command is running"):
                await first.snapshot()
            await job.kill()
            snapshot = await first.snapshot()
            await first.execute("echo two > a/b/f; rm old")
            changed = await first.execute("cat link; ls")
            await first.restore(snapshot)
            restored = await first.execute("cat link; ls old")
        forks = [Sandbox(config(engine), snapshot) for _ in range(2)]
        await asyncio.gather(*(fork.start() for fork in forks))
        seen = [
            await fork.execute(
                "cat link hard /tmp/t; stat -c '%a %Y' a/b/f old | tr '\\n' ' '; wc -c < sparse;"
                " cat odd*; chmod 700 c; cat c/g; echo more >> a/b/f; cat link"
            )
            for fork in forks
        ]
        await asyncio.gather(*(fork.stop() for fork in forks))
        await snapshot.delete()
        with pytest.raises(SandboxStartError, match="was deleted"):
            await Sandbox(config(engine), snapshot).start()
        return changed, restored, seen

    changed, restored, seen = asyncio.run(asyncio.wait_for(work(), 180))
    assert (
        changed.stdout.startswith("two\n")
        and "old" not in changed.stdout
        and restored.stdout == "one\nold\n"
    )
    for one in seen:
        lines = one.stdout.splitlines()
        assert (
            lines[:3] == ["one", "one", "t"]
            and "640 " in lines[3]
            and "644 981" in lines[3]
            and lines[3].endswith("5242880")
            and lines[4:] == ["odd", "deep", "one", "more"]
        ), one
    assert containers() == []


# The verifier

SECRET = "the-expected-answer-4711"


def test_the_verifier_comes_after_the_agent_in_a_place_of_its_own(inside):
    """Programs of the agent's that the verifier runs can read neither its script, from its memory
    or its descriptors, nor change its files or the agent's.
    """
    spy = f"""
for f in /proc/[0-9]*/cmdline /proc/[0-9]*/environ /proc/[0-9]*/mem /proc/$PPID/fd/* \\
    /workspace/answer /tmp/* /run/rock/*; do
  head -c 100000 "$f" 2>/dev/null
done | tr '\\0' '\\n' | grep -c {SECRET.replace("-", "[-]")}
cat; echo x > $VERIFIER_FILES/f; rm -f $VERIFIER_FILES/f; echo tampered > answer"""

    async def work(sandbox):
        await sandbox.write_files({"spy": spy, "answer": "right"})
        await sandbox.execute(
            "setsid bash -c 'while :; do echo tampered > /tmp/x; done' & cat > /tmp/bashrc; echo"
            " done"
        )
        result = await sandbox.verify(
            f"want={SECRET}; bash spy 2>/dev/null; (bash spy 2>/dev/null); [ $want = {SECRET} ] &&"
            " cat $VERIFIER_FILES/f answer; ls -A /tmp; exit 4",
            files={"f": b"graded "},
        )
        slow = await sandbox.verify("sleep 60", timeout=0.3)
        return (
            result,
            slow,
            await sandbox.read_file("answer"),
            (await sandbox.execute("ls -A $VERIFIER_FILES /run/rock/files; echo gone")).stdout,
        )

    result, slow, answer, after = inside(work, env={"BASH_ENV": "/tmp/bashrc"})
    assert (
        (result.stdout, result.exit_code) == ("0\n0\ngraded tampered\n", 4)
        and slow.timed_out
        and answer == b"right"
        and "gone" in after
        and "f" not in after.split()
    )


def test_a_verifier_may_keep_what_it_writes(inside):
    async def work(sandbox):
        await sandbox.execute("echo old > f; echo x > gone; mkdir d; echo y > d/g; chmod 0 d/g d")
        await sandbox.verify("echo new > f; rm gone; chmod 700 d; touch left", keep=True)
        await sandbox.verify("echo lost > f")
        return await sandbox.execute("cat f; ls; ls d; echo more >> f")

    assert inside(work).stdout == "new\nd\nf\nleft\ng\n"


def test_a_sandbox_can_be_committed_to_an_image_and_an_images_own_workspace_is_there(engine):
    from envs.rock.docker.engine import engine as docker_engine

    client = docker_engine().client
    place = client.create_container(engine.image, ["sh"])["Id"]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("workspace", "workspace/of"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("workspace/of/image"))
    client.put_archive(place, "/", content.getvalue())
    client.commit(place, "rock-test/filled", "1")
    client.remove_container(place)

    async def work():
        async with Sandbox(config(engine, image="rock-test/filled:1")) as first:
            begun = (await first.execute("ls -R; echo mine >> of/image; echo t > /tmp/t")).stdout
            await first.commit("rock-test/committed:2")
            await first.execute("rm -r of")
            async with Sandbox(config(engine, image="rock-test/committed:2")) as second:
                seen = (
                    await second.execute("cat of/image /tmp/t; rm of/image; echo two > /tmp/t")
                ).stdout
                await second.commit("rock-test/committed")
        async with Sandbox(config(engine, image="rock-test/committed:latest")) as third:
            return begun, seen, (await third.execute("ls of; cat /tmp/t")).stdout

    assert asyncio.run(asyncio.wait_for(work(), 180)) == (
        ".:\nof\n\n./of:\nimage\n",
        "mine\nt\n",
        "two\n",
    )
    assert containers() == []
