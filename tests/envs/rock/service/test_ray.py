"""Workers over a Ray cluster of several nodes, simulated on this machine: placement by resources, a
node that dies, a node that comes.
"""

import asyncio
import contextlib

import pytest

from envs.rock import Sandbox, SandboxClosedError, SandboxStartError, probe
from envs.rock.service.apps import make_admin
from envs.rock.service.serving import listen, url_of
from tests.envs.rock.service.running import TOKENS, site
from tests.processes import host_processes

# a cluster takes 20 s to come and to go
pytestmark = [pytest.mark.slow, pytest.mark.live]
ray = pytest.importorskip(
    "ray", reason="Ray is not installed (pip install -r requirements-ray.txt)"
)


@pytest.fixture
def cluster():
    if (report := probe()).tier is None:
        pytest.skip(f"no sandbox here: {report.missing[0].reason}")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )  # no processor: no worker there
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster, memory_mb: int):
    """One whose worker gives out four fifths of that memory."""
    return cluster.add_node(num_cpus=1, memory=memory_mb << 20, object_store_memory=80 << 20)


@contextlib.asynccontextmanager
async def admin_over(cluster, data):
    from envs.rock.service.ray_fleet import RayFleet

    listener = listen("127.0.0.1", 0)
    url = url_of("127.0.0.1", listener)
    app = make_admin(
        data,
        TOKENS,
        None,
        300.0,
        (),
        lambda admin: RayFleet(admin, url, {"worker": TOKENS["worker"]}, cluster.address),
    )
    async with site(app, listener) as running:
        yield running


async def workers(site) -> dict[str, int]:
    """Sandboxes on each worker, as the admin's metrics have them."""
    import aiohttp

    async with (
        aiohttp.ClientSession(headers=site.headers()) as http,
        http.get(f"{site.url}/metrics") as answer,
    ):
        lines = (await answer.text()).splitlines()
    return {
        line.split('"')[1]: int(float(line.split()[-1]))
        for line in lines
        if line.startswith("rock_worker_sandboxes_used{")
    }


async def until(condition, seconds: float = 60.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while not (found := await condition()):
        assert asyncio.get_running_loop().time() < deadline, "it did not come about in time"
        await asyncio.sleep(0.1)
    return found


def test_sandboxes_go_where_there_is_room_and_a_dead_nodes_are_told_of_and_replaced(
    cluster, tmp_path
):
    small, large = add_node(cluster, 400), add_node(cluster, 1000)  # MiB: 320 and 800 are given out
    names = {node: f"ray-{node.node_id[:16]}" for node in (small, large)}

    async def work():
        async with admin_over(cluster, tmp_path) as site:

            async def there(*nodes):
                return set(await workers(site)) == {names[node] for node in nodes}

            await until(lambda: there(small, large))
            async with contextlib.AsyncExitStack() as stack:

                def config(memory_mb, **fields):
                    return site.config(memory_mb=memory_mb, disk_mb=8, **fields)

                big = Sandbox(config(500))
                await big.start()  # fits on the large one alone
                placed = [await workers(site)]
                second = await stack.enter_async_context(
                    Sandbox(config(200))
                )  # the small one is emptier
                third = await stack.enter_async_context(
                    Sandbox(config(250))
                )  # only the large one has room for it now
                placed.append(await workers(site))
                said = (await second.execute("echo two")).stdout + (
                    await third.execute("echo three")
                ).stdout
                with pytest.raises(SandboxStartError, match="fits nowhere"):
                    await Sandbox(config(900)).start()
                await second.stop()

                mark = "97531" + str(site.url.rpartition(":")[2])
                running = asyncio.create_task(third.execute(f"sleep {mark}", timeout=100))
                waiting = asyncio.create_task(
                    stack.enter_async_context(Sandbox(config(300, start_timeout=90)))
                )  # it fits, the small one is free
                await until(lambda: _true(host_processes(mark)))
                cluster.remove_node(large, allow_graceful=False)
                with pytest.raises(SandboxClosedError) as lost:
                    await running
                with pytest.raises(SandboxClosedError):
                    await big.execute("true")
                await until(
                    lambda: _true(not host_processes(mark))
                )  # nothing of a dead node runs on
                elsewhere = await waiting
                replaced = (await elsewhere.execute("echo elsewhere")).stdout
                late = asyncio.create_task(
                    stack.enter_async_context(Sandbox(config(310, start_timeout=90)))
                )  # in the queue until a node comes
                await until(lambda: there(small))
                names["new"] = f"ray-{add_node(cluster, 1000).node_id[:16]}"
                await until(lambda: there(small, "new"))
                await late
                await big.stop()
                return placed, said, lost.value.code, replaced, await workers(site)

    placed, said, code, replaced, after = asyncio.run(asyncio.wait_for(work(), 200))
    assert (
        placed == [{names[small]: 0, names[large]: 1}, {names[small]: 1, names[large]: 2}]
        and said == "two\nthree\n"
    )
    assert (
        code in ("worker_lost", "ended", "closed")
        and replaced == "elsewhere\n"
        and after == {names[small]: 1, names["new"]: 1}
    )


async def _true(value) -> bool:
    return bool(value)
