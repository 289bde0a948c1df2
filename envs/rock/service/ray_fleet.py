"""Workers over a Ray cluster: one actor on each node, which serves the sandboxes of that node as a
worker of its own process would.

Ray finds the nodes, starts the workers, and tells at once when one is lost. It does not see single
sandboxes: an actor for each would cost half a second and 90 MiB, a sandbox costs ten milliseconds
and half a MiB. So a worker takes its memory from Ray's books in one piece, and the admin places
sandboxes in it by memory, processors and processes (fleet.py), as with any other worker; requests
go straight from the admin to the worker, never through Ray.

Every node needs this repository and its Python packages at the same path. What is lost with a node
is told to its users as "worker_lost" (SandboxClosedError, an infrastructure failure); what was only
being started is started elsewhere, and a node that comes gets a worker. Ray's own cluster is
trusted with the workers' token.
"""

import asyncio
import logging
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

import ray
import yarl
from aiohttp import web
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from envs.rock.service.admin import Admin
from envs.rock.service.apps import make_worker
from envs.rock.service.fleet import Resources, machine_resources
from envs.rock.service.server import RUNNER
from envs.rock.service.worker import Worker

log = logging.getLogger("rock.ray")
LOOK_SECONDS = 1.0  # between two looks at the cluster's nodes
AGAIN_SECONDS = 5.0  # until a node whose worker ended gets another
MEMORY_SHARE = 0.8  # of a node's memory, as Ray has it on its books
REPOSITORY = str(pathlib.Path(__file__).resolve().parents[3])


class NodeWorker:
    """The actor. One method, which serves until the actor is killed or its node is lost."""

    async def serve(
        self,
        name: str,
        admin_url: str,
        tokens: dict[str, str],
        backends: tuple[str, ...],
        given_out: Resources,
        loopback: bool,
    ) -> None:
        logging.basicConfig(level=logging.INFO)
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        listener = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        application = make_worker(
            Worker(backends), tokens, admin_url, {"name": name, "url": url, **given_out._asdict()}
        )
        runner = web.AppRunner(application, **RUNNER)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


class RayFleet:
    """Keeps a worker on every node of a cluster, for one admin.

    `start` and `close` it in the admin's event loop.

    Args:
      address: of the cluster, "auto" for the one that this machine is of. ConnectionError from
        `ray.init` where there is none.
      resource: only nodes that offer this resource of Ray's get a worker; "": all.
      limits: (memory_mb, cpus, sandboxes) of each worker; 0: MEMORY_SHARE of the node's memory, 32
        times its processors, as descriptors allow.
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
        self._admin, self._url, self._tokens, self._backends, self._resource, self._limits = (
            admin,
            admin_url,
            dict(tokens),
            backends,
            resource,
            limits,
        )
        self._loopback = yarl.URL(admin_url).host in (
            "localhost",
            "127.0.0.1",
            "::1",
        )  # then only this machine's nodes can reach it
        if not ray.is_initialized():
            ray.init(
                address=address,
                namespace="rock",
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": REPOSITORY}},
            )
        self._actors: dict[
            str, tuple[str, Any, asyncio.Task]
        ] = {}  # by node: the worker's name, the actor, and who waits for its end
        self._not_before: dict[str, float] = {}
        self._looking: asyncio.Task | None = None

    async def start(self) -> None:
        self._looking = asyncio.create_task(self._look_for_ever())

    async def close(self) -> None:
        """End the workers, and with them their sandboxes."""
        if self._looking:
            self._looking.cancel()
        for _, actor, waiting in self._actors.values():
            waiting.cancel()
            ray.kill(actor)
        self._actors.clear()

    async def _look_for_ever(self) -> None:
        while True:
            try:
                self._look(
                    {
                        node["NodeID"]: node
                        for node in await asyncio.to_thread(ray.nodes)
                        if node["Alive"]
                    }
                )
            except Exception as error:
                log.error("the cluster cannot be looked at", exc_info=error)
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        now = asyncio.get_running_loop().time()
        for node in [node for node in self._actors if node not in nodes]:
            self._lose(node, "its node left the cluster")
        for node, about in nodes.items():
            offers = about["Resources"]
            if (
                node not in self._actors
                and now >= self._not_before.get(node, 0.0)
                and (not self._resource or self._resource in offers)
                and offers.get("CPU", 0) >= 1
            ):
                self._hire(node, offers)

    def _hire(self, node: str, offers: Mapping[str, float]) -> None:
        memory_mb, cpus, sandboxes = self._limits
        memory_mb = memory_mb or int(MEMORY_SHARE * offers.get("memory", 0)) >> 20
        given_out = machine_resources(memory_mb, cpus or 32.0 * offers["CPU"], 0, sandboxes)
        actor = (
            ray.remote(NodeWorker)
            .options(
                num_cpus=1,
                memory=memory_mb << 20,
                max_restarts=0,
                max_concurrency=2,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote()
        )
        name = f"ray-{node[:16]}"
        end = actor.serve.remote(
            name, self._url, self._tokens, self._backends, given_out, self._loopback
        )
        self._actors[node] = name, actor, asyncio.create_task(self._await_end(node, end))
        log.info("node %s gets worker %s: %s", node, name, given_out)

    async def _await_end(self, node: str, end: Any) -> None:
        try:
            await end
            why = "its actor ended"
        except ray.exceptions.RayError as error:
            why = f"its actor ended: {type(error).__name__}"
            log.warning(
                "the worker of node %s ended: %s", node, str(error).strip().splitlines()[-1:]
            )
        self._lose(node, why)

    def _lose(self, node: str, why: str) -> None:
        name, actor, waiting = self._actors.pop(node)
        if waiting is not asyncio.current_task():
            waiting.cancel()
        ray.kill(actor)  # nothing happens if it is dead
        self._not_before[node] = asyncio.get_running_loop().time() + AGAIN_SECONDS
        self._admin.lose_worker(name, why)
