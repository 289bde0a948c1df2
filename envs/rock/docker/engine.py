"""The Docker engine of this machine, as this process uses it.

The calls of the docker SDK block, so they run in threads, each with a deadline.
"""

import asyncio
import contextlib
import functools
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TypeVar

import docker
import requests

from envs.rock.config import SandboxConfig
from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError

T = TypeVar("T")
CALL_SECONDS = 30.0  # for one answer of the engine
CALLS_AT_ONCE = 16
DEFAULT_HOST = "unix:///var/run/docker.sock"
OWNER = "rock.owner"  # label: the process that made a container, see `identity`
MANAGER = "rock.manager"  # label: which Engine object made it
_CONFLICT = 409  # HTTP status


class Engine:
    """The engine at DOCKER_HOST (a unix socket), and this process's containers in it.

    Use the function `engine`, which makes one for the process.

    Attributes:
      client: the docker SDK's client.
      info: the engine's description of itself.
      on_memory_kill: container id -> called, in a thread, for each of its processes that its memory
        limit has killed.
      workspaces: image id -> a tar of what the image has in /workspace, None for nothing.
      surveys: (image id, runtime) -> what the image's tools can do, see scripts.SURVEY.
    """

    def __init__(self, host: str):
        if not host.startswith("unix://"):
            raise SandboxStartError(
                f"DOCKER_HOST is {host}: sandboxes are containers of this machine's own engine, at"
                " a unix:// socket; on other machines run a ROCK worker"
            )
        if not os.path.exists(host.removeprefix("unix://")):
            raise SandboxStartError(f"there is no Docker engine: nothing is at {host}")
        self.host = host
        self.workspaces: dict[str, IO[bytes] | None] = {}
        self.surveys: dict[tuple[str, str], frozenset[str]] = {}
        self._manager = secrets.token_hex(8)
        self.on_memory_kill: dict[str, Callable[[], None]] = {}
        self._calls = ThreadPoolExecutor(CALLS_AT_ONCE, "rock-docker")
        try:
            self.client = docker.APIClient(
                host, version="auto", timeout=CALL_SECONDS, max_pool_size=CALLS_AT_ONCE
            )
            self.info = self.client.info()
            self._remove_orphans()
            label = f"{MANAGER}={self._manager}"
            filters = {"type": "container", "event": "oom", "label": label}
            events = self.client.events(decode=True, filters=filters)
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise SandboxStartError(f"no Docker engine answers at {host}: {error}") from error
        watcher = threading.Thread(
            target=self._watch_events, args=(events,), name="rock-docker-events", daemon=True
        )
        watcher.start()

    @property
    def one_user_namespace(self) -> bool:
        """Whether containers have only the user ids below 65536."""
        options = self.info.get("SecurityOptions") or ()
        return any("name=userns" in option or "name=rootless" in option for option in options)

    def runtime(self, config: SandboxConfig) -> str:
        """Return the name of the runtime that a sandbox of this config gets."""
        return config.runtime or self.info.get("DefaultRuntime", "")

    def labels(self) -> dict[str, str]:
        """Return the labels that mark a container as this process's."""
        return {OWNER: json.dumps(identity(os.getpid())), MANAGER: self._manager}

    async def call(
        self,
        function: Callable[..., T],
        *arguments: object,
        seconds: float = CALL_SECONDS,
        **options: object,
    ) -> T:
        """Run a blocking call of the SDK in a thread.

        Raises:
          SandboxClosedError: the container or image does not exist, or no longer runs.
          SandboxError: the engine refuses, or does not answer within `seconds`.
        """
        call = asyncio.get_running_loop().run_in_executor(
            self._calls, functools.partial(function, *arguments, **options)
        )
        name = getattr(function, "__name__", "a stream")
        try:
            # Not wait_for, which loses a cancellation that arrives together with the answer.
            async with asyncio.timeout(seconds):
                return await call
        except TimeoutError:
            raise SandboxError(
                f"the Docker engine did not answer {name} within {seconds:.0f} s"
            ) from None
        except docker.errors.NotFound as error:
            raise SandboxClosedError(
                f"the Docker engine does not have it any more: {error.explanation}"
            ) from error
        except docker.errors.NullResource as error:
            raise SandboxClosedError("the sandbox has ended") from error
        except docker.errors.APIError as error:
            raise _refusal(error, name) from error
        except (docker.errors.DockerException, requests.RequestException) as error:
            raise SandboxError(
                f"the Docker engine at {self.host} does not answer {name}: {error}"
            ) from error

    def _remove_orphans(self) -> None:
        """Remove containers whose managers died; they also end by themselves, see scripts.INIT."""
        for container in self.client.containers(all=True, filters={"label": OWNER}):
            if _is_dead(container["Labels"][OWNER]):
                with contextlib.suppress(docker.errors.APIError):
                    self.client.remove_container(container["Id"], force=True)

    def _watch_events(self, events: Iterable[dict]) -> None:
        """Pass on the engine's events, one for each killed process, in a thread of its own."""
        with contextlib.suppress(
            docker.errors.DockerException, requests.RequestException, OSError, ValueError
        ):
            for event in events:
                callback = self.on_memory_kill.get(event["id"])
                if callback is not None:
                    callback()


_engines: dict[str, Engine] = {}
_lock = threading.Lock()


def engine() -> Engine:
    """Return the engine at DOCKER_HOST; this process has one connection to it.

    This may block: call it in a thread.

    Raises:
      SandboxStartError: no engine answers there.
    """
    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    with _lock:
        if host not in _engines:
            _engines[host] = Engine(host)
        return _engines[host]


def identity(pid: int) -> dict[str, str | int]:
    """Return what tells a process from all others, also in other containers and earlier boots."""
    with open(f"/proc/{pid}/stat") as file:
        started = file.read().rpartition(")")[2].split()[19]
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    namespace = os.readlink("/proc/self/ns/pid")
    return {"pid": pid, "started": started, "boot": boot, "namespace": namespace}


def _is_dead(label: str) -> bool:
    """Return whether the process of an OWNER label is known to have died.

    A process of another pid namespace cannot be judged from here, so it counts as alive.
    """
    try:
        owner = json.loads(label)
        here = identity(os.getpid())
        if owner["boot"] != here["boot"]:
            return True
        return owner["namespace"] == here["namespace"] and identity(int(owner["pid"])) != owner
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        return False  # not a label of ours


def _refusal(error: docker.errors.APIError, name: str) -> SandboxError:
    explanation = error.explanation or ""
    if error.status_code == _CONFLICT and "is not running" in explanation:
        return SandboxClosedError("the container of the sandbox has ended")
    return SandboxError(f"the Docker engine refused {name}: {explanation or error}")


def _forget_after_fork() -> None:
    global _engines, _lock
    _engines = {}
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
