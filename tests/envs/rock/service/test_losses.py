"""What is left when one side goes away in the middle: nothing that runs, nothing that holds a
place, and no descriptor.
"""

import asyncio
import contextlib

import aiohttp
import pytest

from envs.rock import Sandbox, SandboxClosedError, probe
from envs.rock.remote import connection
from envs.rock.service.worker import Worker
from tests.envs.rock.service.running import admin

pytestmark = pytest.mark.skipif(probe().tier is None, reason="no sandbox can be had here")
ONE_PLACE = (1 << 20, 1000.0, 100_000, 1)


def run(work):
    return asyncio.run(asyncio.wait_for(work, 180))


async def eventually(condition, seconds: float = 60.0) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not (found := await condition()) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
    return found


async def states(site) -> dict[str, int]:
    """Sandboxes by state, as the admin's metrics have them."""
    async with (
        aiohttp.ClientSession(headers=site.headers()) as http,
        http.get(f"{site.url}/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    return {
        line.split('"')[1]: int(float(line.split()[-1]))
        for line in lines
        if line.startswith("rock_sandboxes{")
    }


def test_two_who_stop_it_at_once_both_succeed(tmp_path):
    async def work():
        async with admin(tmp_path) as site, Sandbox(site.config()) as sandbox:
            await asyncio.gather(sandbox.stop(), sandbox.stop())
            return sandbox.is_alive()

    assert run(work()) is False


def test_a_start_that_is_given_up_in_the_queue_takes_no_place(tmp_path):
    async def work():
        async with admin(tmp_path, resources=ONE_PLACE) as site, Sandbox(site.config()):
            waiting = asyncio.create_task(Sandbox(site.config()).start())
            queued = await eventually(lambda: has(site, queued=1))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            return queued, await eventually(lambda: has(site, queued=0, starting=0, running=1))

    assert run(work()) == (True, True)


async def has(site, **wanted: int) -> bool:
    return (await states(site)).items() >= wanted.items()


def test_a_caller_without_a_key_who_leaves_ends_what_it_asked_for(tmp_path):
    """curl and Ctrl-C: the command dies, and the start in the queue too."""

    async def work():
        async with admin(tmp_path, resources=ONE_PLACE) as site, Sandbox(site.config()) as sandbox:
            async with aiohttp.ClientSession(headers=site.headers()) as http:
                for op, body in (
                    ("execute", {"sandbox": sandbox.id, "command": "sleep 50", "timeout": 60}),
                    ("start", {"config": {"isolation": "best_available"}}),
                ):
                    with contextlib.suppress(asyncio.TimeoutError):
                        await http.post(
                            f"{site.url}/apis/envs/sandbox/v1/{op}",
                            json=body,
                            timeout=aiohttp.ClientTimeout(total=0.5),
                        )

            async def quiet() -> bool:
                return (await sandbox.get_status()).commands == 0 and await has(
                    site, queued=0, starting=0
                )

            return await eventually(quiet)

    assert run(work()) is True


def test_a_caller_who_leaves_during_a_fork_or_a_snapshot_leaves_none_that_nobody_knows(tmp_path):
    async def work():
        async with admin(tmp_path) as site, Sandbox(site.config()) as sandbox:
            await sandbox.execute("for n in $(seq 500); do echo x > f$n; done")
            async with aiohttp.ClientSession(headers=site.headers()) as http:
                for op, seconds in (("fork", 0.005), ("fork", 0.03), ("snapshot", 0.005)):
                    with contextlib.suppress(asyncio.TimeoutError):
                        await http.post(
                            f"{site.url}/apis/envs/sandbox/v1/{op}",
                            json={"sandbox": sandbox.id},
                            timeout=aiohttp.ClientTimeout(total=seconds),
                        )
            await asyncio.sleep(0.5)
            alone = await eventually(lambda: has(site, queued=0, starting=0, running=1))
            async with (
                aiohttp.ClientSession(headers=site.headers()) as http,
                http.get(f"{site.url}/metrics") as answer,
            ):
                known = int(
                    float(
                        next(
                            line
                            for line in (await answer.text()).splitlines()
                            if line.startswith("rock_snapshots ")
                        ).split()[-1]
                    )
                )
            return alone, known, len(made[0]._snapshots)

    made, original = [], Worker.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Worker, "__init__", lambda self, *given: (original(self, *given), made.append(self))[0]
        )
        alone, known, kept = run(work())
    assert alone and known == kept


def test_an_old_session_that_is_used_during_a_restore_harms_nobody(tmp_path):
    async def work():
        async with admin(tmp_path) as site, Sandbox(site.config()) as sandbox:
            snapshot, session = await sandbox.snapshot(), await sandbox.create_session()
            for _ in range(3):
                restoring = asyncio.create_task(sandbox.restore(snapshot))
                while not restoring.done():
                    with contextlib.suppress(SandboxClosedError):
                        await sandbox.execute("true")
                session.ended = False
                with pytest.raises(SandboxClosedError):
                    await session.run("true")
                await restoring
            await asyncio.sleep(0.3)
            return (await sandbox.execute("echo well")).stdout

    assert run(work()) == "well\n"


def test_a_lost_sandbox_leaves_no_connection_open(tmp_path):
    async def work():
        async with admin(tmp_path) as site:
            sandbox = Sandbox(site.config())
            async with sandbox:
                async with aiohttp.ClientSession(headers=site.headers()) as http:
                    await http.post(
                        f"{site.url}/apis/envs/sandbox/v1/stop", json={"sandbox": sandbox.id}
                    )
                with pytest.raises(SandboxClosedError):
                    await sandbox.execute("true")
                sandbox._backend._calls.mark_ended()  # as when its worker was lost
            return (
                sandbox._backend._client.closed,
                len(sandbox._backend._calls._background),
                dict(connection._connections[asyncio.get_running_loop()]),
            )

    assert run(work()) == (True, 0, {})


@pytest.mark.long
def test_all_sandboxes_at_one_admin_share_its_connections_and_one_sign_of_life(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(connection, "KEEP_ALIVE_SECONDS", 0.1)

    async def work():
        async with admin(tmp_path, auto_clear=3.0) as site:  # thirty signs of life long
            first, second = Sandbox(site.config()), Sandbox(site.config())
            async with first:
                async with second:
                    shared = first._backend._client is second._backend._client
                    await asyncio.sleep(5.0)  # without use, and yet kept
                    await first._backend._client.call("stop", {"sandbox": second.id})
                    noticed = await eventually(lambda: _is(not second.is_alive()))
                return (
                    shared,
                    noticed,
                    (await first.execute("echo well")).stdout,
                    first._backend._client.closed,
                )

    assert run(work()) == (True, True, "well\n", False)


async def _is(value: bool) -> bool:
    return value
