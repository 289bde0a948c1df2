"""Workers on a Ray cluster: one actor on each node, which serves that node's sandboxes.

Ray finds the nodes, starts the workers, and reports at once when one is lost. It does not see
single sandboxes: an actor for each would cost half a second and 90 MiB, while a sandbox costs ten
milliseconds and half a MiB. A worker reserves its memory with Ray in one piece, and the admin
places sandboxes in it by memory, processors and processes (fleet.py), as with any other worker.
Requests go directly from the admin to the worker, never through Ray.

Every node needs this repository and its Python packages at the same path. Sandboxes that are lost
with a node end with "worker_lost" (SandboxClosedError, an infrastructure failure); those that were
still starting are started elsewhere, and a node that joins gets a worker. Ray's own cluster is
trusted with the workers' token.
"""

import asyncio
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
import yarl
from aiohttp import web
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from envs.rock.service.admin import Admin
from envs.rock.service.apps import make_worker
from envs.rock.service.fleet import CPU_OVERCOMMIT, Resources, machine_resources
from envs.rock.service.serving import listen, make_runner, url_of
from envs.rock.service.worker import Worker

log = logging.getLogger("rock.ray")
POLL_SECONDS = 1.0  # between two looks at the cluster's nodes
RESTART_SECONDS = 5.0  # until a node whose worker ended gets another
MEMORY_SHARE = 0.8  # of a node's memory, as Ray counts it
REPOSITORY = str(pathlib.Path(__file__).resolve().parents[3])
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NodeWorker:
    """The actor of one node. Its only method serves until the actor is killed or its node lost."""

    async def serve(
        self,
        name: str,
        admin_url: str,
        tokens: dict[str, str],
        backends: tuple[str, ...],
        resources: Resources,
        loopback: bool,
    ) -> None:
        """Serve this node's sandboxes, on a port of its own.

        Args:
          name: the worker's name at the admin.
          admin_url: where the admin answers.
          tokens: the workers' token by their user name.
          backends: kinds of sandboxes to make.
          resources: what to give out.
          loopback: listen on 127.0.0.1 instead of the node's address.
        """
        logging.basicConfig(level=logging.INFO)
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        listener = listen(host, 0)
        registration = {"name": name, "url": url_of(host, listener), **resources._asdict()}
        application = make_worker(Worker(backends), tokens, admin_url, registration)
        runner = make_runner(application)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


class _NodeActor(NamedTuple):
    name: str  # of the worker
    actor: Any
    waiting: asyncio.Task[None]  # for the actor's end


class RayFleet:
    """Keeps a worker on every node of a Ray cluster, for one admin.

    `start` and `close` it in the admin's event loop.

    Args:
      admin: gets the news of lost workers.
      admin_url: where the nodes reach the admin.
      tokens: the workers' token by their user name.
      address: of the cluster; "auto" for the one that this machine belongs to.
      backends: kinds of sandboxes that the workers make.
      resource: only nodes that offer this resource of Ray's get a worker; "" for all.
      limits: (memory_mb, cpus, sandboxes) of each worker. 0 stands for: 80 % of the node's memory,
        32 times its processors, as many sandboxes as descriptors allow.

    Raises:
      ConnectionError: there is no cluster at `address`.
    """

    def __init__(
        self,
        admin: Admin,
        admin_url: str,
        tokens: Mapping[str, str],
        address: str,
        backends: tuple[str, ...] = ("embedded",),
        resource: str = "",
        limits: tuple[int, float, int] = (0, 0.0, 0),
    ):
        self._admin = admin
        self._url = admin_url
        self._tokens = dict(tokens)
        self._backends = backends
        self._resource = resource
        self._limits = limits
        # an admin on loopback can be reached from this machine's nodes only
        self._loopback = yarl.URL(admin_url).host in _LOOPBACK
        if not ray.is_initialized():
            ray.init(
                address=address,
                namespace="rock",
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": REPOSITORY}},
            )
        self._actors: dict[str, _NodeActor] = {}  # by node
        self._not_before: dict[str, float] = {}  # by node: the earliest time for another worker
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to start workers on the nodes."""
        self._polling = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        """End the workers, and with them their sandboxes."""
        if self._polling:
            self._polling.cancel()
        for node_actor in self._actors.values():
            node_actor.waiting.cancel()
            ray.kill(node_actor.actor)
        self._actors.clear()

    async def _poll_forever(self) -> None:
        while True:
            try:
                nodes = await asyncio.to_thread(ray.nodes)
                self._update({node["NodeID"]: node for node in nodes if node["Alive"]})
            except Exception as error:
                log.error("the cluster's nodes cannot be listed", exc_info=error)
            await asyncio.sleep(POLL_SECONDS)

    def _update(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Start and drop workers so that every suitable live node has one."""
        gone = [node for node in self._actors if node not in nodes]
        for node in gone:
            self._drop_worker(node, "its node left the cluster")
        now = asyncio.get_running_loop().time()
        for node, description in nodes.items():
            offers = description["Resources"]
            may_start = node not in self._actors and now >= self._not_before.get(node, 0.0)
            if may_start and self._is_suitable(offers):
                self._start_worker(node, offers)

    def _is_suitable(self, offers: Mapping[str, float]) -> bool:
        if self._resource and self._resource not in offers:
            return False
        return offers.get("CPU", 0) >= 1

    def _start_worker(self, node: str, offers: Mapping[str, float]) -> None:
        memory_mb, cpus, sandboxes = self._limits
        if not memory_mb:
            memory_mb = int(MEMORY_SHARE * offers.get("memory", 0)) >> 20
        if not cpus:
            cpus = CPU_OVERCOMMIT * offers["CPU"]
        resources = machine_resources(memory_mb, cpus, 0, sandboxes)
        actor_class = ray.remote(NodeWorker).options(
            num_cpus=1,
            memory=memory_mb << 20,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        actor: Any = actor_class.remote()
        name = f"ray-{node[:16]}"
        end = actor.serve.remote(
            name, self._url, self._tokens, self._backends, resources, self._loopback
        )
        waiting = asyncio.create_task(self._await_end(node, end))
        self._actors[node] = _NodeActor(name, actor, waiting)
        log.info("node %s gets worker %s: %s", node, name, resources)

    async def _await_end(self, node: str, end: Any) -> None:
        reason = "its actor ended"
        try:
            await end
        except ray.exceptions.RayError as error:
            reason = f"its actor ended: {type(error).__name__}"
            last_line = str(error).strip().splitlines()[-1:]
            log.warning("the worker of node %s ended: %s", node, last_line)
        self._drop_worker(node, reason)

    def _drop_worker(self, node: str, reason: str) -> None:
        node_actor = self._actors.pop(node)
        if node_actor.waiting is not asyncio.current_task():
            node_actor.waiting.cancel()
        ray.kill(node_actor.actor)  # nothing happens if it is dead
        self._not_before[node] = asyncio.get_running_loop().time() + RESTART_SECONDS
        self._admin.lose_worker(node_actor.name, reason)
