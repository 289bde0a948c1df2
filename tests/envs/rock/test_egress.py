"""What leaves a sandbox: nothing that is not granted, each attempt on record, and what is granted
goes where it was granted to.
"""

import asyncio
import json
import os
import shlex
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.rock import Denial, IsolationError, Sandbox, SandboxConfig, probe
from envs.rock.config import PACKAGE_MIRRORS, parse_grant
from envs.rock.host.egress import MAX_RECORDS, Grant, _question
from tests.processes import host_processes

TRY = """
import socket, sys
def attempt(kind, host, port, say=b""):
    try:
        if kind == "tcp":
            with socket.create_connection((host, port), 5) as s:
                s.sendall(say)
                print(host, port, s.recv(100))
        elif kind == "udp":
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sender = socket.socket(family, socket.SOCK_DGRAM)
            print(host, port, sender.sendto(b"x" * 20, (host, port)))
        else:
            print(host, socket.gethostbyname(host))
    except OSError as error:
        print(host, port, type(error).__name__, error.errno)
"""


@pytest.fixture
def inside():
    if (report := probe(tier="namespaces")).tier is None:
        pytest.skip(f"no namespaces tier here: {report.missing[0].reason}")

    def run(work, **fields):
        async def steps():
            async with Sandbox(
                SandboxConfig(isolation="best_available", tier="namespaces", **fields)
            ) as sandbox:
                return await work(sandbox)

        return asyncio.run(asyncio.wait_for(steps(), 180))

    return run


def _program(*attempts: tuple) -> str:
    return (
        f"python3 -c {shlex.quote(TRY + ''.join(f'attempt{attempt!r};' for attempt in attempts))}"
    )


def _wanted(denials: list[Denial]) -> list[tuple[str, str, int]]:
    return [(denial.protocol, denial.destination, denial.port) for denial in denials]


def test_every_attempt_is_refused_at_once_and_on_record(inside):
    """The incident of the paper: a reverse tunnel to an address outside, a mining pool by name, and
    what an intruder asks first.
    """
    attempts = [
        ("tcp", "203.0.113.7", 22),
        ("name", "pool.minexmr.example", 0),
        ("tcp", "169.254.169.254", 80),
        ("tcp", "10.0.0.1", 2375),
        ("tcp", "2001:db8::7", 443),
        ("udp", "198.51.100.9", 123),
        ("udp", "2001:db8::8", 123),
        ("tcp", "127.0.0.1", 9),
        ("tcp", "::1", 9),
    ]

    async def work(sandbox):
        before, began = await sandbox.get_status(), time.time()
        result = await sandbox.execute(_program(*attempts))
        return before, began, result, await sandbox.denials(), await sandbox.get_status()

    before, began, result, denials, after = inside(work, label="episode 7")
    assert (
        result.stdout.count("ConnectionRefusedError 111") == 6 and "gaierror -2" in result.stdout
    )  # all are answers: those who wait in vain are told other errors
    assert sorted(_wanted(denials)) == [
        ("dns", "pool.minexmr.example", 0),
        ("tcp", "10.0.0.1", 2375),
        ("tcp", "169.254.169.254", 80),
        ("tcp", "2001:db8::7", 443),
        ("tcp", "203.0.113.7", 22),
        ("udp", "198.51.100.9", 123),
        ("udp", "2001:db8::8", 123),
    ]
    assert before.network_denials == 0 and after.network_denials == 7
    assert all(
        denial.label == "episode 7" and began - 1 < denial.time < time.time() + 1
        for denial in denials
    )


def test_its_own_loopback_is_the_sandboxs_own(inside):
    program = (
        "import socket; s = socket.create_server(('127.0.0.1', 8000)); c ="
        " socket.create_connection(('127.0.0.1', 8000)); s.accept()[0].send(b'in');"
        " print(c.recv(9))"
    )

    async def work(sandbox):
        return (await sandbox.execute(f'python3 -c "{program}"')).stdout, await sandbox.denials()

    assert inside(work) == ("b'in'\n", [])


def test_what_is_granted_is_reached_and_nothing_beside_it(inside):
    heard = []

    async def answer(reader, writer):
        heard.append(await reader.read(100))
        writer.write(b"reply")
        writer.close()

    async def with_server():
        async with (
            await asyncio.start_server(answer, "127.0.0.1", 0) as server,
            await asyncio.start_server(answer, "127.0.0.1", 0) as other,
        ):
            port, closed = server.sockets[0].getsockname()[1], other.sockets[0].getsockname()[1]
            config = SandboxConfig(
                tier="namespaces", egress=(f"model@127.0.0.1:{port}", f"10.9.9.9:{port}")
            )
            async with Sandbox(config) as sandbox:
                attempts = [
                    ("tcp", "model", port, b"ask"),
                    ("tcp", "MODEL", port, b"again"),
                    ("tcp", "model", closed),
                    ("tcp", "other", port),
                    ("tcp", "127.0.0.1", port),
                    ("tcp", "8.8.4.4", port),
                ]
                result = await sandbox.execute(_program(*attempts))
                return port, closed, result.stdout.splitlines(), await sandbox.denials()

    port, closed, lines, denials = asyncio.run(asyncio.wait_for(with_server(), 180))
    assert heard == [b"ask", b"again"] and lines[:2] == [
        f"model {port} b'reply'",
        f"MODEL {port} b'reply'",
    ]
    assert all("error" in line.lower() for line in lines[2:])
    assert [wanted for wanted in _wanted(denials) if wanted[1][:7] != "198.18."] == [
        ("dns", "other", 0),
        ("tcp", "8.8.4.4", port),
    ]
    assert [wanted[2] for wanted in _wanted(denials) if wanted[1][:7] == "198.18."] == [
        closed
    ]  # the granted name, another port


def test_a_granted_name_that_leads_to_a_private_address_is_refused(inside):
    """Whoever owns a granted name decides where it leads.

    The host's own network must not be among the choices.
    """
    reached = []

    async def with_server():
        async with await asyncio.start_server(
            lambda reader, writer: reached.append(1), "127.0.0.1", 0
        ) as server:
            port = server.sockets[0].getsockname()[1]
            async with Sandbox(
                SandboxConfig(tier="namespaces", egress=(f"localhost:{port}",))
            ) as sandbox:
                query = b"\0\7\1\0\0\1\0\0\0\0\0\0\x09localhost\0\0\1\0\1"
                program = (
                    f"import socket\nu = socket.socket(2, 2); u.settimeout(5); u.sendto({query!r},"
                    " ('127.0.0.1', 53)); a ="
                    " socket.inet_ntoa(u.recv(512)[-4:])\nprint(socket.create_connection((a,"
                    f" {port})).recv(9))"
                )
                result = await sandbox.execute(f"python3 -c {shlex.quote(program)}")
                return result.stdout, await sandbox.denials(), await sandbox.get_status()

    stdout, denials, status = asyncio.run(asyncio.wait_for(with_server(), 180))
    assert stdout == "b''\n" and not reached and status.network_denials == 1
    assert denials[0].destination.startswith("localhost (") and "private" in denials[0].destination


def test_a_flood_is_counted_but_not_kept_and_the_sandbox_goes_on(inside):
    program = (
        "import socket; u = socket.socket(2, 2)\nfor n in range(20000):\n  try: u.sendto(b'x',"
        " ('9.9.9.9', 5))\n  except OSError: pass"
    )

    async def work(sandbox):
        await sandbox.execute(f'python3 -c "{program}"', timeout=20)
        return (
            await sandbox.denials(),
            (await sandbox.get_status()).network_denials,
            (await sandbox.execute("echo well")).stdout,
        )

    denials, count, said = inside(work)
    assert len(denials) <= MAX_RECORDS <= count and said == "well\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pypi.org",
        "pypi.org:0",
        "pypi.org:65536",
        ":443",
        "*:443",
        "a..b:1",
        "1.2.3:4",
        "1.2.3.400:4",
        "127.0.0.1:80",
        "x@:1",
        "@1.2.3.4:1",
        "x@host:1",
        "a b:1",
        "a*.b:1",
    ],
)
def test_a_malformed_grant_is_an_error_that_names_it(text):
    with pytest.raises(ValueError, match="egress grant"):
        SandboxConfig(egress=(text,))


@pytest.mark.parametrize(
    "text, grant",
    [
        ("PyPI.org:443", ("pypi.org", None, 443)),
        ("*.example.org:1", ("*.example.org", None, 1)),
        ("10.1.2.3:8080", (None, "10.1.2.3", 8080)),
        ("model@127.0.0.1:3", ("model", "127.0.0.1", 3)),
    ],
)
def test_grants_are_read(text, grant):
    assert parse_grant(text) == grant


def test_the_package_mirrors_are_grants():
    assert len(SandboxConfig(egress=PACKAGE_MIRRORS).grants()) == len(PACKAGE_MIRRORS)


@pytest.mark.parametrize(
    "grant, name, covered",
    [
        ("a.org", "a.org", True),
        ("a.org", "b.a.org", False),
        ("*.a.org", "b.a.org", True),
        ("*.a.org", "c.b.a.org", True),
        ("*.a.org", "a.org", False),
        ("*.a.org", "xa.org", False),
        ("*.a.org", ".a.org", False),
        ("a.org", None, False),
        (None, "a.org", False),
    ],
)
def test_what_a_grant_covers(grant, name, covered):
    assert Grant(grant, None, 1).covers(name) is covered


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=80), st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=5)
    )
)
def test_any_query_is_read_or_ignored(query):
    if isinstance(query, bytes):
        assert _question(query) is None or len(query) >= 17
        return
    packed = (
        b"\0\1\1\0\0\1\0\0\0\0\0\0"
        + b"".join(bytes([len(label)]) + label for label in query)
        + b"\0"
        + struct.pack(">HH", 28, 1)
    )
    name, kind, end = _question(packed)
    assert kind == 28 and end == len(packed) and len(name) <= 255
    assert name.isascii() and name.isprintable() and len(json.dumps(name)) <= 2 * len(name) + 2


# Asks for 256 names of 240 bytes: all records together are as long as can be.
ASK = """
import socket, struct
resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
resolver.connect(("127.0.0.1", 53))
resolver.settimeout(5)
for number in range(256):
    name = bytes({name}) * 59
    labels = [struct.pack(">H", number) + name[place : place + 58] for place in range(0, 232, 58)]
    packed = b"".join(bytes([len(label)]) + label for label in labels)
    head = struct.pack(">6H", number, 0x100, 1, 0, 0, 0)
    resolver.send(head + packed + bytes(1) + struct.pack(">HH", 1, 1))
    resolver.recv(512)
print("asked")
"""


@pytest.mark.parametrize(
    "name",
    [[0] * 4, [255] * 4, [0xED, 0xA0, 0x80, 0x41], [10, 13, 27, 91], [34, 92, 34, 92], [46] * 4],
    ids=["NUL", "no UTF-8", "lone surrogates", "escapes of a terminal", "quotes", "dots"],
)
def test_denials_of_any_names_are_told(inside, name):
    async def work(sandbox):
        asked = await sandbox.execute(f"python3 -c {shlex.quote(ASK.format(name=name))}")
        return asked, await sandbox.denials(), await sandbox.get_status()

    asked, denials, status = inside(work)
    assert asked.stdout == "asked\n" and asked.network_denials == 256
    assert len(denials) == MAX_RECORDS == status.network_denials
    assert all(one.protocol == "dns" and one.destination.isprintable() for one in denials)


def test_a_command_tells_how_many_attempts_were_its_own(inside):
    async def work(sandbox):
        results = [
            await sandbox.execute(command)
            for command in (
                _program(("tcp", "9.9.9.9", 1), ("tcp", "9.9.9.8", 2)),
                "true",
                _program(("udp", "9.9.9.7", 3)),
            )
        ]
        async with await sandbox.create_session() as session:
            results.append(await session.run(_program(("name", "example.org", 0))))
        return [result.network_denials for result in results]

    assert inside(work) == [2, 0, 1, 1]


def test_connections_that_a_busy_manager_does_not_take_do_not_stretch_the_time_limit():
    """The holder keeps the limits. What it hands over must neither hold it up nor bring it down."""
    program = (
        "import socket\nkept = []\nwhile True:\n  try:\n    s = socket.create_connection(('model',"
        " {port}), 1); kept = (kept + [s])[-40:]\n  except OSError: pass"
    )

    async def with_server():
        async with await asyncio.start_server(
            lambda reader, writer: writer.close(), "127.0.0.1", 0
        ) as server:
            port = server.sockets[0].getsockname()[1]
            async with Sandbox(
                SandboxConfig(tier="namespaces", egress=(f"model@127.0.0.1:{port}",))
            ) as sandbox:
                mark = f"busy-{os.getpid()}"
                command = f"exec python3 -c {shlex.quote(program.format(port=port))} {mark}"
                running = asyncio.create_task(sandbox.execute(command, timeout=1.5))
                while not host_processes(mark) and not running.done():
                    await asyncio.sleep(0.01)
                ends = time.monotonic() + 60
                while host_processes(mark) and time.monotonic() < ends:
                    time.sleep(0.1)  # as a manager that compiles, until the holder has ended it
                left = host_processes(mark)
                return await running, left, (await sandbox.execute("echo well")).stdout

    if (report := probe(tier="namespaces")).tier is None:
        pytest.skip(f"no namespaces tier here: {report.missing[0].reason}")
    result, left, said = asyncio.run(asyncio.wait_for(with_server(), 120))
    assert result.timed_out and left == 0 and said == "well\n"


def test_the_landlock_tier_refuses_grants_that_it_cannot_give():
    if (report := probe("best_available", "landlock")).tier is None:
        pytest.skip(f"no landlock tier here: {report.missing[0].reason}")
    with pytest.raises(IsolationError, match="egress"):
        asyncio.run(
            Sandbox(
                SandboxConfig(isolation="best_available", tier="landlock", egress=("pypi.org:443",))
            ).start()
        )
