"""What leaves a container: nothing that is not granted, each attempt on record, as in the embedded
backend (test_egress.py).
"""

import asyncio
import os
import shlex

import pytest

from envs.rock import IsolationError, Sandbox
from envs.rock.host.egress import MAX_RECORDS
from tests.envs.rock.in_docker import config, containers

# an engine of their own
pytestmark = [pytest.mark.slow, pytest.mark.docker]


def _wanted(denials) -> list[tuple[str, str, int]]:
    return sorted((denial.protocol, denial.destination, denial.port) for denial in denials)


def test_every_attempt_is_refused_at_once_and_on_record(inside):
    """The incident of the paper: a reverse tunnel to an address outside, a mining pool by name, and
    what an intruder asks first.
    """
    tries = (
        "tcp/203.0.113.7/22",
        "tcp/pool.minexmr.example/3333",
        "tcp/169.254.169.254/80",
        "tcp/10.0.0.1/2375",
        "udp/198.51.100.9/123",
        "tcp/2001:db8::7/443",
        "tcp/127.0.0.1/9",
        "tcp/::1/9",
    )

    async def work(sandbox):
        before = await sandbox.get_status()
        result = await sandbox.execute(
            "; ".join(f"(echo x > /dev/{one}) && echo REACHED" for one in tries)
        )
        async with await sandbox.create_session() as session:
            told = (
                await session.run("echo x > /dev/tcp/203.0.113.8/23; true"),
                await session.run("true"),
            )
        return before, result, told, await sandbox.denials(), await sandbox.get_status()

    before, result, told, denials, after = inside(work, label="episode 7")
    assert (
        result.stderr.count("Connection refused") >= 6
        and result.stdout == "REACHED\n"
        and result.seconds < 60  # a connection that nobody answers is tried for two minutes
    )  # UDP is told nothing
    assert _wanted(denials) == [
        ("dns", "pool.minexmr.example", 0),
        ("tcp", "10.0.0.1", 2375),
        ("tcp", "169.254.169.254", 80),
        ("tcp", "2001:db8::7", 443),
        ("tcp", "203.0.113.7", 22),
        ("tcp", "203.0.113.8", 23),
        ("udp", "198.51.100.9", 123),
    ]
    assert (
        before.network_denials,
        result.network_denials,
        told[0].network_denials,
        told[1].network_denials,
        after.network_denials,
    ) == (0, 6, 1, 0, 7)
    assert {denial.label for denial in denials} == {"episode 7"}


def test_what_is_granted_is_reached_and_nothing_beside_it(engine):
    heard = []

    async def answer(reader, writer):
        heard.append(await reader.readline())
        writer.write(b"reply")
        writer.close()

    async def with_server():
        async with (
            await asyncio.start_server(answer, "127.0.0.1", 0) as server,
            await asyncio.start_server(answer, "127.0.0.1", 0) as other,
        ):
            port, closed = server.sockets[0].getsockname()[1], other.sockets[0].getsockname()[1]
            ask = "ask() { (exec 3<>/dev/tcp/$1/$2 && echo $3 >&3 && cat <&3); }; "
            async with (
                Sandbox(
                    config(engine, egress=(f"model@127.0.0.1:{port}", f"10.9.9.9:{port}"))
                ) as sandbox,
                Sandbox(config(engine)) as sibling,
            ):
                result = await sandbox.execute(
                    ask
                    + f"ask model {port} one; ask MODEL {port} two; ask model {closed} x; ask other"
                    f" {port} x; ask 127.0.0.1 {port} x; ask 8.8.4.4 {port} x"
                )
                verified = await sandbox.verify(ask + f"ask model {port} three; ask 9.9.9.9 1 x")
                beside = await sibling.execute(ask + f"ask model {port} x; ask 10.9.9.9 {port} x")
                return (
                    port,
                    closed,
                    result,
                    verified,
                    beside,
                    _wanted(await sandbox.denials()),
                    _wanted(await sibling.denials()),
                )

    port, closed, result, verified, beside, denials, siblings = asyncio.run(
        asyncio.wait_for(with_server(), 60)
    )
    assert heard == [b"one\n", b"two\n", b"three\n"] and (
        result.stdout,
        verified.stdout,
        beside.stdout,
    ) == ("replyreply", "reply", "")
    assert [one for one in denials if one[1][:7] != "198.18."] == [
        ("dns", "other", 0),
        ("tcp", "8.8.4.4", port),
        ("tcp", "9.9.9.9", 1),
    ]
    assert [one[2] for one in denials if one[1][:7] == "198.18."] == [
        closed
    ] and verified.network_denials == 1  # the granted name, another port
    assert siblings == [("dns", "model", 0), ("tcp", "10.9.9.9", port)]


def test_a_granted_name_that_leads_to_a_private_address_is_refused(engine):
    reached = []

    async def with_server():
        async with await asyncio.start_server(
            lambda reader, writer: reached.append(1), "127.0.0.1", 0
        ) as server:
            port = server.sockets[0].getsockname()[1]
            async with Sandbox(config(engine, egress=(f"localhost:{port}",))) as sandbox:
                query = (  # not by the C library, which knows localhost
                    "\\0\\7\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\11localhost\\0\\0\\1\\0\\1"
                )
                program = (
                    f'use Socket; socket(S, 2, 2, 0); send(S, "{query}", 0, pack_sockaddr_in(53,'
                    ' inet_aton("127.0.0.1"))); recv(S, $a, 512, 0); print join ".", unpack("C4",'
                    " substr $a, -4)"
                )
                result = await sandbox.execute(
                    f"a=$(perl -e {shlex.quote(program)}); echo $a; exec 3<>/dev/tcp/$a/{port} &&"
                    " cat <&3"
                )
                return result.stdout, await sandbox.denials(), await sandbox.get_status()

    stdout, denials, status = asyncio.run(asyncio.wait_for(with_server(), 180))
    assert stdout == "198.18.0.1\n" and not reached and status.network_denials == 1
    assert denials[0].destination.startswith("localhost (") and "private" in denials[0].destination


def test_a_flood_is_counted_but_not_kept_and_the_guards_go_with_their_containers(engine):
    program = (
        'use Socket; socket(S, 2, 2, 0); $to = pack_sockaddr_in(5, inet_aton("9.9.9.9")); send(S,'
        ' "x", 0, $to) for 1..20000'
    )

    async def work():
        async with Sandbox(config(engine)) as first:
            await first.execute("true")
            before = len(os.listdir("/proc/self/fd"))
            async with Sandbox(config(engine)) as sandbox:
                await sandbox.execute(f"perl -e {shlex.quote(program)}", timeout=20)
                denials, count, said = (
                    await sandbox.denials(),
                    (await sandbox.get_status()).network_denials,
                    (await sandbox.execute("echo well")).stdout,
                )
            return denials, count, said, len(os.listdir("/proc/self/fd")) - before

    denials, count, said, left = asyncio.run(asyncio.wait_for(work(), 180))
    assert (
        len(denials) == MAX_RECORDS < count and said == "well\n" and left <= 1
    )  # the engine's pool may have one connection more
    assert containers() == []


def test_where_no_guard_can_be_had_grants_are_refused_by_name_and_the_rest_is_isolated_all_the_same(
    engine, monkeypatch
):
    from envs.rock.docker import network as docker_network

    monkeypatch.setattr(docker_network.os, "geteuid", lambda: 1000)

    async def plain():
        async with Sandbox(config(engine)) as sandbox:
            return (
                await sandbox.execute("echo > /dev/tcp/8.8.8.8/53 && echo REACHED"),
                (await sandbox.get_status()).network_denials,
                await sandbox.denials(),
            )

    with pytest.raises(
        IsolationError, match=r"egress and doors.*pypi.org.*not root.*leave both empty"
    ):
        asyncio.run(Sandbox(config(engine, egress=("pypi.org:443",))).start())
    result, count, denials = asyncio.run(plain())
    assert "Network is unreachable" in result.stderr and count is None and denials == []
    assert "network of its own" in docker_network.obstacle("runsc")


def test_no_guard_is_ever_put_into_this_machines_own_network():
    """There it would make every address of the world local."""
    from envs.rock import SandboxError
    from envs.rock.docker import network as docker_network

    with pytest.raises(SandboxError, match="not of the container"):
        docker_network._in_network_of(
            os.getpid(), "0123456789abcdef", lambda: pytest.fail("entered")
        )
    with pytest.raises(SandboxError, match="this machine's own network"):
        docker_network._in_network_of(os.getpid(), "", lambda: pytest.fail("entered"))
