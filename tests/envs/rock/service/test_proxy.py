"""Behind a proxy that breaks, delays or answers with its own pages, everything happens once."""

import asyncio
import contextlib
import dataclasses

import aiohttp
import pytest
from aiohttp import web

from envs.rock import Sandbox, SandboxConfig, SandboxError, SandboxStartError, probe
from envs.rock.remote import calls
from envs.rock.service.auth import Tokens
from envs.rock.service.server import Server
from envs.rock.service.worker import Worker
from envs.rock.wire.client import Client
from envs.rock.wire.errors import Disconnected
from envs.rock.wire.operations import TO_WORKER
from tests.envs.rock.service import running
from tests.envs.rock.service.running import TOKENS, WORKER_RESOURCES

pytestmark = pytest.mark.skipif(probe().tier is None, reason="no sandbox can be had here")
PAGE = "<html><h1>%d</h1></html>"
SLOW = pytest.mark.slow  # the same with another fault: 1 s each
FAULTS = (
    "page after it",
    "own page",
    "cut",
    *(pytest.param(name, marks=SLOW) for name in ("page", "break", "break after it", "limit")),
    pytest.param("timeout", marks=SLOW),
)
_KEPT = ("Content-Type", "Authorization")


class Proxy:
    """A reverse proxy under /rock that spoils the first request of each operation.

    Attributes:
      fault: how: a page of 502 (before or after the service has answered), a broken connection
        (likewise), a page with status 200, one of 429, a page of 504 while the service works on,
        an answer that breaks off in its middle.
      spoiled: the operations that were.
    """

    def __init__(self, target: str, fault: str):
        self.target = target
        self.fault = fault
        self.spoiled: list[str] = []

    @contextlib.asynccontextmanager
    async def serve(self):
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/rock{path:.*}", self._pass)
        self._http = aiohttp.ClientSession(auto_decompress=False)
        async with self._http, running.site(app) as site:
            yield f"{site.url}/rock"

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        op = path.rpartition("/")[2]
        spoil = self.fault if self.fault and op not in self.spoiled else ""
        if spoil:
            self.spoiled.append(op)
        body = await request.read()
        if spoil in ("page", "own page", "limit"):
            status = {"page": 502, "own page": 200, "limit": 429}[spoil]
            return web.Response(status=status, text=PAGE % status, content_type="text/html")
        if spoil == "break":
            request.transport.abort()
            return web.Response()
        headers = {name: request.headers[name] for name in _KEPT if name in request.headers}
        url = self.target + request.path_qs.removeprefix("/rock")
        asking = asyncio.ensure_future(self._ask(request.method, url, body, headers))
        if spoil == "timeout":
            return web.Response(status=504, text=PAGE % 504, content_type="text/html")
        status, content, kind = await asking
        if spoil == "page after it":
            return web.Response(status=502, text=PAGE % 502, content_type="text/html")
        if spoil == "break after it":
            request.transport.abort()
        if spoil == "cut":
            response = web.StreamResponse(status=status, headers={"Content-Type": kind})
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
            request.transport.abort()
            return response
        return web.Response(status=status, body=content, headers={"Content-Type": kind})

    async def _ask(self, method, url, body, headers):
        from yarl import URL

        async with self._http.request(
            method, URL(url, encoded=True), data=body, headers=headers
        ) as answer:
            return answer.status, await answer.read(), answer.headers["Content-Type"]


async def everything(config: SandboxConfig, tmp_path) -> None:
    """Every operation of a sandbox, each of which leaves a mark that shows how often it ran."""
    sandbox = Sandbox(config)
    await sandbox.start()
    assert (await sandbox.execute("echo hi; echo x >> ran")).stdout == "hi\n"
    session = await sandbox.create_session()
    await session.run("n=$((n + 1))")
    assert (await session.run("echo $n")).stdout == "1\n"
    job = await sandbox.spawn(
        "echo x >> spawned; trap 'echo x >> heard' INT; sleep 60 & wait; wait"
    )
    await sandbox.execute("until [ -e spawned ]; do sleep 0.01; done; sleep 0.1")
    await job.interrupt()
    await sandbox.execute("until [ -e heard ]; do sleep 0.01; done")
    assert (await job.kill()).exit_code == 137
    content = bytes(range(256)) * 4000
    await sandbox.write_file("d/f", content, 0o700)
    assert await sandbox.read_file("d/f") == content
    assert ("d/f", len(content)) in [(one.path, one.size) for one in await sandbox.list_files()]
    assert (await sandbox.get_status()).sessions == 1 and await sandbox.denials() == []
    await session.close()
    assert (await sandbox.get_status()).sessions == 0
    snapshot = await sandbox.snapshot()
    await sandbox.execute("rm ran")
    await sandbox.restore(snapshot)
    await snapshot.delete()
    copy = await sandbox.fork()
    assert (await copy.execute("cat ran spawned heard; stat -c %a d/f")).stdout == "x\nx\nx\n700\n"
    await copy.stop()
    (tmp_path / "up").mkdir()
    (tmp_path / "up/f").write_bytes(content)
    await sandbox.upload(tmp_path / "up", "up")
    await sandbox.download("up", tmp_path / "down")
    assert (tmp_path / "down/f").read_bytes() == content
    await sandbox.commit("kept")
    await sandbox.kill_all()
    verified = await sandbox.verify("cat $VERIFIER_FILES/v", files={"v": b"seen"})
    assert verified.stdout == "seen"
    await sandbox.stop()


async def counted(site) -> dict[str, int]:
    async with (
        aiohttp.ClientSession(headers=site.headers()) as http,
        http.get(f"{site.url}/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    return {line.split()[0]: int(float(line.split()[1])) for line in lines if line[0] != "#"}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_happens_once_behind_a_bad_proxy(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "RETRY_SECONDS", 0.01)

    async def work():
        async with running.admin(tmp_path / "data") as site:
            proxy = Proxy(site.url, fault)
            async with proxy.serve() as url:
                config = dataclasses.replace(site.config(), url=url)
                await everything(config, tmp_path)
            figures = await counted(site)
            running_now = figures['rock_sandboxes{state="running"}']
            return proxy.spoiled, running_now, figures["rock_snapshots"]

    spoiled, left, snapshots = asyncio.run(asyncio.wait_for(work(), 180))
    assert {"start", "execute", "spawn", "write_file", "read_file", "stop", "commit"} <= set(
        spoiled
    )
    assert {"interrupt", "kill", "kill_all", "close_session", "restore", "verify"} <= set(spoiled)
    assert (left, snapshots) == (0, 0)


def test_an_answer_that_is_not_rocks_is_named_as_such(tmp_path):
    answers = {413: "raise its limit", 404: "the address of an admin", 403: "not ROCK's answer"}

    async def work():
        asked = iter(answers)

        async def answer(request):
            return web.Response(status=next(asked), text="<html>", content_type="text/html")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        said = []
        async with running.site(app) as site:
            client = Client(site.url, "token")
            for _ in answers:
                with pytest.raises(SandboxError) as raised:
                    await client.call("is_alive", {"sandbox": "sb"})
                assert not isinstance(raised.value, Disconnected)
                said.append(str(raised.value))
            await client.close()
        return said

    for (status, words), said in zip(answers.items(), asyncio.run(work()), strict=True):
        assert f"HTTP status {status} from something between here and" in said and words in said


@pytest.mark.parametrize("fault", ["page after it", pytest.param("page", marks=SLOW)])
def test_a_worker_behind_a_bad_proxy_is_not_lost_and_runs_nothing_twice(
    fault, tmp_path, monkeypatch
):
    monkeypatch.setattr(calls, "RETRY_SECONDS", 0.01)

    async def work():
        worker = Worker()
        routes = Server(worker, TO_WORKER, Tokens(TOKENS), "worker", only_for="worker")
        async with (
            running.admin(tmp_path / "data", worker=False) as site,
            running.site(routes.app()) as own,
        ):
            proxy = Proxy(own.url, fault)
            async with proxy.serve() as url:
                client = Client(site.url, TOKENS["worker"])
                request = {
                    "name": "one",
                    "url": url,
                    "kinds": await worker.kinds(),
                    "incarnation": worker.incarnation,
                    **WORKER_RESOURCES._asdict(),
                }
                proxy.spoiled.append("ping")
                await client.call("worker/register", request)
                proxy.spoiled.clear()
                await everything(site.config(), tmp_path)
                await client.close()
                return proxy.spoiled, worker.held()

    spoiled, left = asyncio.run(asyncio.wait_for(work(), 180))
    assert {"create", "execute", "kill", "write_file", "stop"} <= set(spoiled) and left == []


def test_a_worker_that_cannot_be_reached_is_refused_and_a_start_says_so(tmp_path):
    async def work():
        async with running.admin(tmp_path, worker=False) as site:
            client = Client(site.url, TOKENS["worker"])
            said = []
            for url in ("http://0.0.0.0:1", "http://[::]:1", "http://127.0.0.1:1", site.url):
                request = {
                    "name": "one",
                    "url": url,
                    "kinds": ["embedded:best_available"],
                    "incarnation": "x" * 32,
                    **WORKER_RESOURCES._asdict(),
                }
                with pytest.raises(SandboxError, match="--advertise") as raised:
                    await client.call("worker/register", request)
                said.append((url in str(raised.value), raised.value.code))
            with pytest.raises(SandboxStartError, match=r"no worker is registered.*--advertise"):
                await Sandbox(site.config(start_timeout=0.3)).start()
            await client.close()
            return said

    assert asyncio.run(asyncio.wait_for(work(), 180)) == [(True, "conflict")] * 4
