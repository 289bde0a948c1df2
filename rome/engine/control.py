"""What a trainer asks of an SGLang server, or of an embedded engine, besides sampling.

Pauses, weights, adapters by name, memory, and the server's word on what it holds. Every wait has a
deadline.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import aiohttp

from rome.engine.answers import blame_engine
from rome.engine.connection import (
    RETRY_STATUS,
    UPDATE_SECONDS,
    Wire,
    error_text,
    require_object,
)
from rome.engine.dialect import Dialect, dialect_of
from rome.engine.errors import EngineError
from rome.engine.mirror import MirrorClient
from rome.engine.weights import ADAPTER_PREFIX, Weights, file_checksums

HEALTH_SECONDS = 30.0  # SGLang's /health generates a token and may take 20 s on a busy server
CONTROL_SECONDS = 60.0
MEMORY_TAGS = ("weights", "kv_cache")
PauseMode = Literal["abort", "retract", "in_place"]
# busy: it answers 429 or 503; hung: it takes connections and does not answer; gone: it takes none
Health = Literal["well", "busy", "hung", "gone"]


class Control:
    """The control routes of one server.

    Args:
      url: without a slash at its end.
      wire: carries the requests.
      mirror: copies weights to the server's host; None if the server reads the trainer's directory
        itself.
    """

    def __init__(self, url: str, wire: Wire, mirror: MirrorClient | None):
        self.url = url
        self.mirror = mirror
        self._connection = wire
        self._info_routes: dict[str, str] = {}
        self._adapter: Weights | None = None  # that requests name; None: the weights themselves

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        await self._connection.close()

    # -- control of the server
    # ---------------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling.

        Args:
          mode: what happens to running requests. "abort" returns them as they are, "retract"
            computes their cache anew when sampling continues, "in_place" freezes them.
        """
        async with self._connection.deadline(CONTROL_SECONDS, f"pause({mode})"):
            await self._connection.post_for_any("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Continue sampling after `pause`."""
        async with self._connection.deadline(CONTROL_SECONDS, "continue"):
            await self._connection.post_for_any("/continue_generation", {})

    async def load(self, weights: Weights, *, flush: bool) -> None:
        """Bring weights to the engine, by way of its mirror where it has one.

        Args:
          weights: where they are.
          flush: see `update_weights`.
        """
        path = weights.path
        if self.mirror is not None:
            path = await self.mirror.fetch(path)
        await self.update_weights(str(path.resolve()), weights.version, flush=flush)

    async def load_adapter(self, weights: Weights) -> bool:
        """Load adapters by name, and use them for all requests from now on.

        Running requests go on with those that they began with. What earlier publications loaded is
        unloaded, except what is used now.

        Args:
          weights: with `adapter`.

        Returns:
          Whether the server had the adapters of this client's last call: it is the same process,
          with the same weights.

        Raises:
          RequestRejected: the server does not load them: it has no room, or was started without.
          EngineError: it failed.
        """
        name = weights.adapter_name
        current = "" if self._adapter is None else self._adapter.adapter_name
        what = f"loading adapters {weights.version}"
        async with self._connection.deadline(UPDATE_SECONDS, what):
            models = await self._connection.request("GET", "/v1/models", None)
            listed = require_object(self.url, "/v1/models", models.body)
            with blame_engine(self.url, "/v1/models"):
                loaded = [str(model["id"]) for model in listed["data"]]
            for other in loaded:
                if other.startswith(ADAPTER_PREFIX) and (other != current or other == name):
                    await self._connection.post("/unload_lora_adapter", {"lora_name": other})
            path = str(weights.adapter_path.resolve())
            body = {"lora_name": name, "lora_path": path}
            answer = await self._connection.post("/load_lora_adapter", body)
        if answer.get("success") is not True:
            raise EngineError(
                f"{self.url} did not load {path}: {answer.get('error_message')}; start it with room"
                " for adapters (--max_loaded_loras; SGLang: --enable-lora --max-lora-rank"
                " --lora-target-modules)"
            )
        self._adapter = weights
        return current in loaded

    async def update_weights(self, path: str, version: int, *, flush: bool = True) -> None:
        """Load the weights of a Hugging Face directory that the server can read.

        Success of this call proves nothing: check `model_info` and `score` before sampling.

        Args:
          path: the directory, as the server sees it.
          version: reported by the server for tokens sampled from these weights.
          flush: whether to forget cached prefixes. Must be False while requests are frozen (pause
            "in_place"): SGLang 0.5.23 then answers 400 although the weights changed.

        Raises:
          EngineError: the server says that it did not load them.
        """
        body = {
            "model_path": str(path),
            "weight_version": str(version),
            "flush_cache": flush,
            "abort_all_requests": False,
        }
        async with self._connection.deadline(UPDATE_SECONDS, "a weight update"):
            answer = await self._connection.post("/update_weights_from_disk", body)
        self._adapter = None
        if answer.get("success") is not True:
            raise EngineError(
                f"{self.url} did not take weights {version} from {path}: {answer.get('message')}"
            )

    async def release_memory(self, tags: tuple[str, ...] = MEMORY_TAGS) -> None:
        """Free the device's memory for another process.

        The engine must be idle and stays paused; SGLang needs --enable-memory-saver.
        """
        async with self._connection.deadline(CONTROL_SECONDS, "release_memory_occupation"):
            await self._connection.post_for_any("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: tuple[str, ...] = MEMORY_TAGS) -> None:
        """Allocate the memory again that `release_memory` freed.

        Its content is undefined: load and verify weights before anything is sampled.
        """
        async with self._connection.deadline(CONTROL_SECONDS, "resume_memory_occupation"):
            await self._connection.post_for_any("/resume_memory_occupation", {"tags": list(tags)})

    # -- state of the server
    # ---------------------------------------------------------------------------------------------

    async def checksum(self, adapter: str = "") -> dict[str, Any]:
        """Return the server's hashes of its weights, comparable between servers of one kind.

        Args:
          adapter: name of the adapters whose hashes are wanted instead, of an embedded engine.
        """
        body = {"action": "checksum"}
        if adapter:
            body["lora_name"] = adapter
        async with self._connection.deadline(CONTROL_SECONDS, "weights_checker"):
            return await self._connection.post("/weights_checker", body)

    async def expected_checksums(self, weights: Weights) -> dict[str, str]:
        """Return what `checksum` says of an embedded engine that holds these weights."""
        info = await self.server_info()
        return await asyncio.to_thread(file_checksums, weights.path, info["dtype"])

    async def model_info(self) -> dict[str, Any]:
        """Return what the server says about its model, `weight_version` among it."""
        return await self._get_info("model_info")

    async def server_info(self) -> dict[str, Any]:
        """Return what the server says about itself, `version` among it."""
        return await self._get_info("server_info")

    async def dialect(self) -> Dialect:
        """Ask the server which protocol version it speaks.

        Not cached: the server at a URL may be replaced by another version.

        Raises:
          EngineError: the server is too old, or runs several tokenizer workers.
        """
        info = await self.server_info()
        with blame_engine(self.url, "/server_info"):
            num_workers = int(info.get("tokenizer_worker_num") or 1)
        if num_workers > 1:
            raise EngineError(
                f"{self.url} runs {num_workers} tokenizer workers: a pause and an"
                " update may meet different ones; start it with --tokenizer-worker-num 1"
            )
        is_embedded = info.get("engine") == "rome.serve"
        return dialect_of(self.url, str(info.get("version", "")), is_embedded)

    async def health(self, seconds: float = HEALTH_SECONDS) -> Health:
        """Return how the server is doing; an unhealthy server is never an exception.

        Args:
          seconds: time after which it counts as hung. SGLang generates a token to answer and may
            need 20 s, so a shorter wait condemns busy servers.
        """
        try:
            async with asyncio.timeout(seconds):
                status = await self._connection.status("/health_generate")
        except TimeoutError:  # also aiohttp's own, of a connection that was not accepted
            return "hung"
        except (aiohttp.ClientError, OSError):
            return "gone"
        if status == 200:
            return "well"
        return "busy" if status in RETRY_STATUS else "gone"

    async def _get_info(self, name: str) -> dict[str, Any]:
        """Return the answer of /NAME, or of /get_NAME as old servers call it."""
        async with self._connection.deadline(CONTROL_SECONDS, name):
            if name not in self._info_routes:
                response = await self._connection.request("GET", f"/{name}", None)
                if response.status == 200:
                    self._info_routes[name] = f"/{name}"
                    return require_object(self.url, f"/{name}", response.body)
                self._info_routes[name] = f"/get_{name}"
            route = self._info_routes[name]
            response = await self._connection.request("GET", route, None)
            if response.status != 200:
                del self._info_routes[name]
                raise EngineError(
                    f"{self.url}{route} answered {response.status}:"
                    f" {error_text(response.body)}; is this an SGLang server?"
                )
            return require_object(self.url, route, response.body)
