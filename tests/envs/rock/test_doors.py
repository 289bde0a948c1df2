"""Doors: what a program in a sandbox reaches by a door's name, and what it cannot do with it."""

import asyncio
import dataclasses

import pytest
from aiohttp import web

from envs.rock import IsolationError, Sandbox, SandboxConfig, probe
from envs.rock.doors import MAX_REFUSALS, Door
from envs.rock.wire.client import Client
from tests.envs.rock.service import running
from tests.envs.rock.waiting import until, until_exists
from tests.processes import open_files

# An HTTP request by bash alone, which every image has.
ASK = (
    "ask() { exec 3<>/dev/tcp/$1/$2 || return; printf 'GET %s HTTP/1.1\\r\\nHost: x\\r\\n"
    "Connection: close\\r\\n\\r\\n' $3 >&3; cat <&3; exec 3>&-; };"
)


@pytest.fixture(
    params=[
        "namespaces",
        "remote",
        pytest.param("docker", marks=[pytest.mark.slow, pytest.mark.docker]),
        pytest.param("remote docker", marks=[pytest.mark.slow, pytest.mark.docker]),
    ]
)
def inside(request, tmp_path):
    """Runs work(make) on a loop; make(doors=...) returns a sandbox of the backend, not started."""
    engine = request.getfixturevalue("engine") if "docker" in request.param else None
    if engine is None and (report := probe(tier="namespaces")).tier is None:
        pytest.skip(f"no namespaces tier here: {report.missing[0].reason}")
    image = {"image": engine.image, "memory_mb": 128} if engine else {}

    def run(work):
        def make_local(**fields):
            backend = {"backend": "docker"} if engine else {"tier": "namespaces"}
            config = SandboxConfig(isolation="best_available", **backend, **image, **fields)
            return Sandbox(config)

        async def steps():
            if not request.param.startswith("remote"):
                return await work(make_local)
            backends = ("embedded", "docker")
            async with running.admin(tmp_path / "admin", backends=backends) as site:
                return await work(lambda **fields: Sandbox(site.config(**image, **fields)))

        return asyncio.run(asyncio.wait_for(steps(), 120))

    return run


async def end(connection):
    connection.close()


NOBODY = Door(end)


def says(text: str) -> Door:
    """A door whose HTTP server answers with a text and the path."""

    async def answer(request):
        return web.Response(text=f"{text} {request.path}")

    return Door.http(web.Server(answer))


def test_a_door_leads_to_its_handler_and_opens_nothing_else(inside):
    async def work(make):
        async with make(doors={"model:80": says("hello")}) as sandbox:
            command = (
                f"{ASK} ask MODEL 80 /v1/models; ask model 81 /; ask other 80 /; ask 8.8.8.8 80 /"
            )
            result = await sandbox.execute(command, timeout=30)
            denied = {(one.destination, one.port) for one in await sandbox.denials()}
            return result, denied

    result, denied = inside(work)
    assert result.stdout.count("HTTP/1.1 200 OK") == 1
    assert result.stdout.endswith("hello /v1/models")
    assert ("8.8.8.8", 80) in denied and ("other", 0) in denied
    assert any(port == 81 for _, port in denied)


def test_a_handler_may_speak_first_and_hear_a_half_closed_connection(inside):
    async def answer(reader, writer):
        writer.write(b"welcome\n")
        heard = await reader.read()
        writer.write(b"heard " + heard)

    async def work(make):
        async with make(doors={"model:80": Door.streams(answer)}) as sandbox:
            # A program whose standard input is the connection; its end closes one direction.
            command = "exec 3<>/dev/tcp/model/80; read -r line <&3; echo $line; echo me >&3"
            return await sandbox.execute(command, timeout=30)

    assert inside(work).stdout == "welcome\n"


def test_callers_are_known_by_their_sandbox(inside):
    async def work(make):
        command = f"{ASK} ask model 80 /"
        one, two = make(doors={"model:80": says("one")}), make(doors={"model:80": says("two")})
        async with one, two:
            snapshot = await one.snapshot()
            config = dataclasses.replace(one.config, doors={"model:80": says("three")})
            async with Sandbox(config, snapshot) as three:
                results = [await each.execute(command, timeout=30) for each in (one, two, three)]
            await snapshot.delete()
            return [result.stdout.split("\r\n\r\n")[-1] for result in results]

    assert inside(work) == ["one /", "two /", "three /"]


def test_a_busy_door_answers_503_and_then_serves_again(inside):
    go_on, asked = asyncio.Event(), []

    async def answer(request):
        asked.append(request)
        await go_on.wait()
        return web.Response(text="done")

    async def work(make):
        door = Door.http(web.Server(answer), max_connections=2)
        async with make(doors={"model:80": door}) as sandbox:
            waiting = await sandbox.spawn(f"{ASK} for i in 1 2; do ask model 80 / & done; wait", 60)
            await until(lambda: len(asked) == 2)
            refused = await sandbox.execute(f"{ASK} ask model 80 /", timeout=30)
            go_on.set()
            served = await waiting.wait()
            again = await sandbox.execute(f"{ASK} ask model 80 /", timeout=30)
            return refused.stdout, served.stdout, again.stdout

    refused, served, again = inside(work)
    assert refused.startswith("HTTP/1.1 503") and "Retry-After: 1" in refused
    assert served.count("done") == 2 and again.endswith("done")


def test_a_flood_ends_with_the_sandbox_and_hurts_nobody_else(inside):
    opened = []

    async def hold(reader, writer):
        opened.append(writer)
        await reader.read()

    async def work(make):
        before = open_files()
        flooding = make(doors={"model:80": Door.streams(hold)}, open_files=512, pids=128)
        other = make(doors={"model:80": says("other")})
        async with flooding, other:
            flood = "for i in {1..200}; do exec {fd}<>/dev/tcp/model/80; done; touch made; sleep 60"
            job = await flooding.spawn(flood, 60)
            await until_exists(flooding, "made")
            await until(lambda: opened)
            served = len(opened)
            held = (open_files() - before).total()
            result = await other.execute(f"{ASK} ask model 80 /", timeout=30)
            await job.kill()
        await until(lambda: (open_files() - before).total() <= 8)
        return served, held, result.stdout

    served, held, answer = inside(work)
    assert 0 < served <= 64 and answer.endswith("other /")
    assert held < 3 * (64 + MAX_REFUSALS) + 60  # a relayed connection has three ends here


def test_an_error_of_a_handler_ends_its_connection_alone(inside):
    seen = []

    async def answer(reader, writer):
        if await reader.readline() == b"break\n":
            raise RuntimeError("a bug of the handler")
        writer.write(b"fine\n")

    async def work(make):
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
        async with make(doors={"model:80": Door.streams(answer)}) as sandbox:
            talk = "exec 3<>/dev/tcp/model/80; echo $1 >&3; cat <&3"
            commands = [talk.replace("$1", word) for word in ("break", "go")]
            return [(await sandbox.execute(one, timeout=30)).stdout for one in commands]

    assert inside(work) == ["", "fine\n"]
    assert [str(one["exception"]) for one in seen if "exception" in one] == ["a bug of the handler"]


def test_the_end_of_a_sandbox_cancels_its_handlers(inside):
    begun, ended = [], []

    async def hold(reader, writer):
        begun.append(True)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    async def work(make):
        async with make(doors={"model:80": Door.streams(hold)}) as sandbox:
            job = await sandbox.spawn("exec 3<>/dev/tcp/model/80; sleep 60", 60)
            await until(lambda: begun)
            del job
        await until(lambda: ended)

    inside(work)
    assert ended == [True]


@pytest.mark.parametrize(
    "name",
    ["model", "model:0", "model:70000", "*.x:80", "localhost:80", "10.0.0.1:80", ":80", "a b:80"],
)
def test_what_is_no_door_is_refused(name):
    with pytest.raises(ValueError, match="is not NAME:PORT"):
        SandboxConfig(doors={name: NOBODY})


def test_a_door_that_egress_grants_too_is_refused():
    with pytest.raises(ValueError, match="Model:80 is a door and granted by egress too"):
        SandboxConfig(doors={"Model:80": NOBODY}, egress=("model@10.0.0.1:80",))


def test_configs_with_other_doors_are_equal_so_builds_are_shared():
    assert SandboxConfig(doors={"model:80": NOBODY}) == SandboxConfig()
    assert "model" not in repr(SandboxConfig(doors={"model:80": NOBODY}))


def test_the_landlock_tier_refuses_doors():
    if probe(tier="landlock").tier is None:
        pytest.skip("no landlock tier here")
    config = SandboxConfig(isolation="best_available", tier="landlock", doors={"model:80": NOBODY})
    with pytest.raises(IsolationError, match=r"doors \(model:80\).*landlock tier refuses"):
        asyncio.run(Sandbox(config).start())


def test_a_template_of_the_admin_has_no_doors(tmp_path):
    if probe().tier is None:
        pytest.skip("no sandbox here")

    async def work():
        async with running.admin(tmp_path / "admin") as site:
            client = Client(site.url, running.TOKENS["default"])
            config = {"isolation": "best_available"}
            await client.call("template/register", {"name": "plain", "config": config})
            await client.close()
            sandbox = Sandbox(site.config(image="plain", doors={"model:80": NOBODY}))
            with pytest.raises(ValueError, match="doors beside the template plain"):
                await sandbox.start()

    asyncio.run(asyncio.wait_for(work(), 180))
