"""The services over HTTP: tokens, queues, silent admins, warm pools, hostile requests."""

import asyncio
import contextlib
import json
import logging
import re

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem.server import PREFIX as GEM
from envs.rock import Sandbox, SandboxClosedError, SandboxError, SandboxStartError, probe
from envs.rock.service import heartbeat
from envs.rock.service.auth import Tokens
from envs.rock.service.fleet import Resources
from envs.rock.service.server import Server
from envs.rock.service.worker import Worker
from envs.rock.wire.client import Client
from envs.rock.wire.operations import SANDBOX, TO_ADMIN, TO_WORKER
from tests.envs.rock.service import running
from tests.envs.rock.service.running import TOKENS
from tests.envs.rock.service.test_losses import eventually, has


@pytest.fixture(autouse=True)
def a_sandbox_can_be_had():
    if (report := probe()).tier is None:
        pytest.skip(f"no sandbox here: {report.missing[0].reason}")


def run(work, seconds=180):
    return asyncio.run(asyncio.wait_for(work, seconds))


def test_tokens_decide_who_may_what(tmp_path):
    async def work():
        answers = {}
        async with (
            running.admin(tmp_path) as site,
            aiohttp.ClientSession() as http,
            Sandbox(site.config()) as sandbox,
        ):

            async def ask(path, method="POST", headers=None, body=None):
                async with http.request(
                    method,
                    site.url + path,
                    headers=headers or {},
                    json=body if body is not None else {},
                ) as answer:
                    return answer.status, (
                        (await answer.json())["error"]["code"]
                        if answer.status >= 400 and path.startswith(SANDBOX)
                        else ""
                    )

            mine = {"sandbox": sandbox.id, "command": "true"}
            answers["none"] = await ask(SANDBOX + "execute", body=mine)
            answers["wrong"] = await ask(
                SANDBOX + "execute", headers={"Authorization": "Bearer wrong"}, body=mine
            )
            answers["other"] = await ask(
                SANDBOX + "execute", headers=site.headers("other"), body=mine
            )
            answers["key"] = await ask(
                SANDBOX + "execute", headers={"X-API-Key": TOKENS["default"]}, body=mine
            )
            answers["worker"] = await ask(
                SANDBOX + "execute", headers=site.headers("worker"), body=mine
            )
            answers["heartbeat"] = (
                await ask(
                    "/apis/envs/worker/v1/heartbeat",
                    headers=site.headers(),
                    body={"incarnation": "x" * 10},
                )
            )[0]
            answers["gem"] = (
                (await ask(GEM + "/list", "GET"))[0],
                (await ask(GEM + "/list", "GET", site.headers()))[0],
            )
            answers["open"] = [
                (await ask(path, "GET"))[0] for path in ("/health", "/openapi.json", "/metrics")
            ]
        return answers

    assert run(work()) == {
        "none": (401, "unauthorized"),
        "wrong": (401, "unauthorized"),
        "other": (404, "unknown_sandbox"),
        "key": (200, ""),
        "worker": (403, "forbidden"),
        "heartbeat": 403,
        "gem": (401, 200),
        "open": [200, 200, 401],
    }


def test_no_secret_is_ever_logged(tmp_path, caplog):
    async def work():
        async with (
            running.admin(tmp_path) as site,
            Sandbox(site.config(env={"KEY": "the-secret-key"})) as sandbox,
        ):
            await sandbox.execute("echo the-secret-command; echo $KEY")
            await sandbox.write_file("the-secret-file", b"the-secret-content")
            with pytest.raises(SandboxError):
                await sandbox.read_file("the-secret-missing")
            async with (
                aiohttp.ClientSession() as http,
                http.post(
                    site.url + SANDBOX + "execute?token=the-secret-query",
                    headers={"Authorization": "Bearer the-secret-token"},
                ),
            ):
                pass

    with caplog.at_level(logging.DEBUG):
        run(work())
    assert (
        "execute" in caplog.text
        and "the-secret" not in caplog.text
        and not any(token in caplog.text for token in TOKENS.values())
    )


def test_starts_wait_for_room_in_fair_order_and_are_told_when_it_is_too_late(tmp_path):
    async def work():
        async with running.admin(tmp_path, resources=(600, 64.0, 0, 2)) as site:
            order, sandboxes = [], []

            async def start(user, number):
                sandbox = Sandbox(site.config(user, memory_mb=256, disk_mb=8, start_timeout=120))
                await sandbox.start()
                order.append((user, number))
                await asyncio.sleep(0.05)
                await sandbox.stop()

            for _ in range(2):  # no room is left
                sandboxes.append(Sandbox(site.config(memory_mb=256, disk_mb=8)))
                await sandboxes[-1].start()
            late = Sandbox(site.config(memory_mb=256, disk_mb=8, start_timeout=0.2))
            with pytest.raises(SandboxStartError, match="ran out in the queue"):
                await late.start()
            with pytest.raises(SandboxStartError, match="fits nowhere"):
                await Sandbox(site.config(memory_mb=9999, disk_mb=8)).start()
            waiting = [asyncio.create_task(start("default", number)) for number in range(6)]
            assert await eventually(lambda: has(site, queued=6))
            waiting.append(asyncio.create_task(start("other", 0)))
            assert await eventually(lambda: has(site, queued=7))
            for sandbox in sandboxes:
                await sandbox.stop()
            await asyncio.gather(*waiting)
            return order

    order = run(work())
    assert len(order) == 7 and order.index(("other", 0)) <= 2  # six waited before it


def test_a_worker_whose_admin_is_silent_and_one_that_holds_forgotten_sandboxes_end_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "DEAD_SECONDS", 0.3)

    async def work():
        worker = Worker()
        arguments = {"backend": "embedded", "config": {"isolation": "best_available"}}
        async with (
            running.admin(tmp_path, worker=False) as site,
            running.worker_of(site.url, "one", worker=worker),
        ):
            with contextlib.suppress(SandboxError):  # it may be ended before it is there
                await worker.call(
                    "worker/create", arguments | {"sandbox": "sb-forgotten"}
                )  # the admin knows of none
            await _until(lambda: not worker.held())
            async with Sandbox(site.config()) as sandbox:
                await asyncio.sleep(0.3)
                assert worker.held() == [sandbox.id]  # what it knows stays
        routes = Server(worker, TO_WORKER, Tokens(TOKENS), "worker", only_for="worker")
        async with running.site(routes.app()) as own:
            registration = {
                "name": "two",
                "url": own.url,
                "kinds": [],
                **Resources(1, 1.0, 1, 1)._asdict(),
            }
            async with running.admin(tmp_path, worker=False) as site:
                client = Client(site.url, TOKENS["worker"])
                signs = asyncio.create_task(heartbeat.report(worker, client, registration))
                assert await eventually(lambda: knows(site, "two"))
                await asyncio.sleep(0.2)  # and the worker knows that it does
            try:  # the admin is gone
                with contextlib.suppress(SandboxError):
                    await worker.call("worker/create", arguments | {"sandbox": "sb-orphan"})
                await _until(lambda: not worker.held())
            finally:
                signs.cancel()
                await client.close()
                await worker.close()

    run(work())


async def knows(site, worker):
    async with (
        aiohttp.ClientSession(headers=site.headers()) as http,
        http.get(site.url + "/metrics") as answer,
    ):
        return f'worker="{worker}"' in await answer.text()


async def _until(holds):
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about within 60 s")


@pytest.mark.long
def test_what_nobody_uses_is_cleared_and_what_is_used_is_not(tmp_path):
    async def work():
        # Long enough that no pause of a busy machine is taken for idleness.
        async with running.admin(tmp_path, auto_clear=3.0) as site:
            client = Client(site.url, TOKENS["default"])
            idle, used = [(await client.call("start", {}))["sandbox"] for _ in range(2)]
            for _ in range(22):
                await asyncio.sleep(0.25)
                await client.call("execute", {"sandbox": used, "command": "true"})
            states = [
                (await client.call("is_alive", {"sandbox": name}))["is_alive"]
                for name in (idle, used)
            ]
            with pytest.raises(SandboxClosedError, match="without use"):
                await client.call("execute", {"sandbox": idle, "command": "true"})
            await client.close()
            return states

    assert run(work()) == [False, True]


def test_templates_are_kept_ready_and_environments_of_the_hub_start_with_their_files(tmp_path):
    async def work():
        async with running.admin(tmp_path) as site:
            client = Client(site.url, TOKENS["default"])
            async with Sandbox(site.config()) as sandbox:
                await sandbox.write_files({"data/f": "kept", "run": ("echo ran", 0o755)})
                await sandbox.commit("team/env")
            await client.call(
                "template/register",
                {
                    "name": "warm",
                    "config": {"isolation": "best_available", "memory_mb": 128, "disk_mb": 8},
                    "environment": "team/env",
                    "ready": 2,
                },
            )
            for _ in range(1200):
                if (await client.call("template/list", {}))["templates"][0]["ready"] == 2:
                    break
                await asyncio.sleep(0.05)
            async with (
                Sandbox(site.config(image="warm")) as warm,
                Sandbox(site.config(image="team/env")) as cold,
            ):
                found = [
                    (await sandbox.execute("cat data/f; ./run")).stdout for sandbox in (warm, cold)
                ]
            text = ""
            async with (
                aiohttp.ClientSession() as http,
                http.get(site.url + "/metrics", headers=site.headers()) as answer,
            ):
                text = await answer.text()
            await client.call("template/delete", {"name": "warm"})
            with pytest.raises(SandboxError):
                await client.call("hub/get", {"name": "nothing"})
            await client.close()
            return found, text

    found, text = run(work())
    assert found == ["keptran\n", "keptran\n"] and 'rock_starts_total{way="ready"} 1' in text


def test_the_document_describes_what_is_served(tmp_path):
    async def work():
        async with (
            running.admin(tmp_path, worker=False) as site,
            aiohttp.ClientSession() as http,
            http.get(site.url + "/openapi.json") as answer,
        ):
            routes = {
                (route.method.lower(), route.resource.canonical)
                for route in site.app.router.routes()
                if route.method != "HEAD" and not route.resource.canonical.startswith(GEM)
            }
            return await answer.json(), routes

    document, routes = run(work())
    described = {
        (method, path)
        for path, item in document["paths"].items()
        for method in item
        if method in ("get", "post", "delete", "put")
    }
    assert described == routes
    assert document["openapi"].startswith("3.")


paths = st.sampled_from(
    sorted(
        {operation.path for operation in TO_ADMIN.values() if operation.shape != "connect"}
        | {"/sandboxes", "/nothing", SANDBOX}
    )
)
bodies = st.one_of(
    st.binary(max_size=60),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "sandbox",
                        "command",
                        "timeout",
                        "env",
                        "config",
                        "wait",
                        "path",
                        "call",
                        "name",
                        "ids",
                        "x",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


def test_any_request_is_answered_with_a_code_and_never_with_a_fault_of_ours(tmp_path):
    """Random bodies, truncated ones and wrong types, on every route and method."""
    loop = asyncio.new_event_loop()
    entered = running.admin(
        tmp_path, resources=(1, 1.0, 0, 1)
    )  # room for nothing: what happens to be a valid start is refused
    site = loop.run_until_complete(entered.__aenter__())
    http = loop.run_until_complete(_session())
    try:

        @settings(max_examples=120, deadline=None)
        @given(
            paths,
            st.sampled_from(["POST", "GET", "PUT", "DELETE"]),
            bodies,
            st.sampled_from(
                [
                    "application/json",
                    "multipart/form-data",
                    "multipart/form-data; boundary=x",
                    "text/plain",
                    "a/b/c",
                ]
            ),
            st.text("a=&%\xff/", max_size=12),
        )
        def attack(path, method, body, kind, query):
            async def ask():
                async with http.request(
                    method,
                    f"{site.url}{path}?{query}",
                    data=body,
                    headers={**site.headers(), "Content-Type": kind},
                ) as answer:
                    return answer.status, await answer.read()

            status, answer = loop.run_until_complete(asyncio.wait_for(ask(), 60))
            assert status < 500 or b"no_capacity" in answer, (path, method, body, answer)
            assert status < 400 or json.loads(answer), answer

        attack()
        raw = loop.run_until_complete(asyncio.wait_for(_raw(site.url, site.headers()), 60))
        assert raw == [400, 400, 413]
    finally:
        loop.run_until_complete(http.close())
        loop.run_until_complete(entered.__aexit__(None, None, None))
        loop.close()


async def _session():
    return aiohttp.ClientSession()


async def _raw(url, headers):
    """Statuses of requests that no client library makes: no HTTP, a body that is cut, one that is
    far too long.
    """
    host, port = url.removeprefix("http://").split(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    statuses = []
    post = f"POST {SANDBOX}execute HTTP/1.1\r\nHost: x\r\n{lines}"
    for text in (
        "\0\1\2 nonsense\r\n\r\n",
        f"{post}Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        f"{post}Content-Length: 99999999\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(text.encode())
        if "99999999" in text:
            writer.write(b"x" * (9 << 20))
        line = await asyncio.wait_for(reader.readline(), 60)
        statuses.append(int(re.match(rb"HTTP/1.[01] (\d+)", line).group(1)))
        writer.close()
    return statuses


def test_resources_are_given_back(tmp_path):
    """Forty sandboxes through room for three, some of whose callers leave: in the end all room is
    free.
    """

    async def work():
        async with running.admin(tmp_path, resources=(3 * 64, 64.0, 0, 3)) as site:

            async def one(number):
                sandbox = Sandbox(site.config(memory_mb=64, disk_mb=8, start_timeout=170))
                starting = asyncio.create_task(sandbox.start())
                if number % 5 == 0:
                    await asyncio.sleep(0.01 * (number % 7))
                    starting.cancel()
                    await asyncio.gather(starting, return_exceptions=True)
                    return
                await starting
                assert (await sandbox.execute("echo x")).stdout == "x\n"
                await sandbox.stop()

            await asyncio.gather(*(one(number) for number in range(40)))
            client = Client(site.url, TOKENS["default"])
            async with aiohttp.ClientSession() as http:
                for _ in range(1200):
                    async with http.get(site.url + "/metrics", headers=site.headers()) as answer:
                        text = await answer.text()
                    if 'rock_worker_sandboxes_used{worker="local"} 0' in text:
                        break
                    await asyncio.sleep(0.05)
            await client.close()
            return text

    text = run(work())
    assert (
        'rock_worker_sandboxes_used{worker="local"} 0' in text
        and 'rock_worker_memory_mb_used{worker="local"} 0' in text
    )
