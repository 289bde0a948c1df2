"""A GEM environment on another machine, behind envs.gem.server.

    env = RemoteEnv("http://host:8080", "game/sokoban", token, num_boxes=2)
    observation, info = env.reset(seed=1)

Any service that speaks ROCK's REST interface for GEM will do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import secrets
from typing import Any

import aiohttp

from envs.gem.core import Env, Info, StepResult
from envs.gem.server import PREFIX
from envs.gem.server_json import ERRORS
from envs.proxies import environment_proxy
from envs.rock import SandboxError
from envs.rock.sync import run

MAX_ANSWER_BYTES = 16 << 20
CONNECT_SECONDS = 10.0
GRACE_SECONDS = 30.0  # beyond call_seconds, until an answer counts as lost
# Attempts of a reset or step whose connection breaks; the call_id makes repetitions harmless.
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.2  # doubled after each attempt
CODES = frozenset(ERRORS) | {"connection", "protocol"}


class RemoteEnvError(SandboxError):
    """A call gave no result: the fault of the infrastructure or the caller, never of the policy.

    `code` is one of CODES.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class RemoteTask:
    """The task that a remote environment says it plays."""

    name: str
    family: str
    seed: int | None


class RemoteEnv(Env):
    """An environment that a server runs; it is made there at the first reset.

    The server closes an environment that is idle for too long. A step then fails, and the next
    reset makes the environment anew. Use either the synchronous or the asynchronous methods.

    Args:
      url: address of the server.
      remote_id: the environment's name on the server.
      token: the server's token; None if it admits everybody.
      call_seconds: as long as the server may take for one call.
      **kwargs: arguments of the environment's constructor, plain JSON values.

    Attributes:
      task: what the environment plays, known after a reset.
      tools: JSON schemas of its tools, known after a reset.
    """

    def __init__(
        self,
        url: str,
        remote_id: str,
        token: str | None = None,
        call_seconds: float = 300.0,
        **kwargs: Any,
    ) -> None:
        self.env_id = remote_id  # `make` overwrites it with the name registered here
        self.task = RemoteTask(remote_id, remote_id, None)
        self.tools: list[dict[str, Any]] = []
        self._remote_id = remote_id
        self._url = url.rstrip("/")
        self._token = token
        self._call_seconds = call_seconds
        self._kwargs = kwargs
        self._sandbox_id: str | None = None
        self._http: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin an episode. See `Env.reset`.

        Raises:
          RemoteEnvError: the server did not answer, or reported an error.
        """
        return run(self.areset(seed), self._max_seconds())

    def step(self, action: str) -> StepResult:
        """Play one turn; errors as in `reset`."""
        return run(self.astep(action), self._max_seconds())

    def close(self) -> None:
        """Close the environment on the server; errors as in `reset`."""
        run(self.aclose(), self._max_seconds())

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin an episode without blocking the event loop. See `reset`."""
        arguments = {} if seed is None else {"seed": seed}
        is_new = self._sandbox_id is None
        if is_new:
            await self._make()
        try:
            answer = await self._turn("reset", arguments)
        except RemoteEnvError as error:
            if error.code != "unknown_instance" or is_new:
                raise
            await self._make()  # the server closed it for idleness
            answer = await self._turn("reset", arguments)
        info = _info(answer)
        name = str(info.get("task", self._remote_id))
        family = str(info.get("family", self._remote_id))
        self.task = RemoteTask(name, family, info.get("seed"))
        self.tools = info.get("tools", [])
        return _text(answer, "observation"), info

    async def _make(self) -> None:
        request: dict[str, Any] = {"env_id": self._remote_id}
        if self._kwargs:
            request["kwargs"] = self._kwargs
        self._sandbox_id = _text(await self._post("make", request), "sandbox_id")

    async def astep(self, action: str) -> StepResult:
        """Play one turn without blocking the event loop. See `step`."""
        if self._sandbox_id is None:
            raise RuntimeError(f"remote environment {self.env_id} has no episode; call reset()")
        answer = await self._turn("step", {"action": action})
        reward = answer.get("reward")
        terminated = answer.get("terminated")
        truncated = answer.get("truncated")
        has_flags = isinstance(terminated, bool) and isinstance(truncated, bool)
        if not isinstance(reward, (int, float)) or not has_flags:
            raise RemoteEnvError(
                "protocol",
                f"the answer to step has reward {reward!r}, terminated {terminated!r}, truncated"
                f" {truncated!r}",
            )
        observation = _text(answer, "observation")
        return observation, float(reward), bool(terminated), bool(truncated), _info(answer)

    async def aclose(self) -> None:
        """Close the environment on the server without blocking the event loop. See `close`."""
        sandbox_id = self._sandbox_id
        self._sandbox_id = None
        try:
            if sandbox_id is not None:
                await self._post("close", {"sandbox_id": sandbox_id})
        except RemoteEnvError as error:
            # the server has closed it already, or will do so when it is idle for too long
            if error.code not in ("unknown_instance", "connection"):
                raise
        finally:
            http = self._http
            self._http = None
            if http is not None:
                await http.close()

    def spawn(self, same_state: bool = False, **kwargs: Any) -> RemoteEnv:
        """Return another environment on the same server.

        Args:
          same_state: must be False, since a remote episode cannot be copied.
          **kwargs: constructor arguments to change.

        Raises:
          NotImplementedError: same_state is True.
        """
        if same_state:
            raise NotImplementedError(
                "a remote episode cannot be copied; spawn(same_state=False) and reset"
            )
        arguments = {**self._kwargs, **kwargs}
        return RemoteEnv(self._url, self._remote_id, self._token, self._call_seconds, **arguments)

    # -- requests

    async def _turn(self, method: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Send a reset or step, again with the same call_id while the connection breaks."""
        body = {"sandbox_id": self._sandbox_id, "call_id": secrets.token_hex(8), **fields}
        for attempt in range(ATTEMPTS - 1):
            try:
                return await self._post(method, body)
            except RemoteEnvError as error:
                if error.code != "connection":
                    raise
            pause = FIRST_PAUSE_SECONDS * 2**attempt
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
        return await self._post(method, body)

    async def _post(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request.

        Raises:
          RemoteEnvError: with the server's code, "connection" or "protocol".
        """
        http = self._session()
        where = f"{method} at {self._url}"
        url = f"{self._url}{PREFIX}/{method}"
        try:
            async with http.post(url, json=body, allow_redirects=False) as response:
                data = await _read_bounded(response, method)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            message = f"{where}: {type(error).__name__}: {error}"
            raise RemoteEnvError("connection", message) from error
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            message = f"{where} answered {response.status} with a body that is not JSON"
            raise RemoteEnvError("protocol", message) from error
        if not isinstance(answer, dict):
            message = f"{where} answered with a JSON {type(answer).__name__}"
            raise RemoteEnvError("protocol", message)
        if response.status != 200:
            raise _decode_error(answer, response.status)
        return answer

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._http is None:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            timeout = aiohttp.ClientTimeout(
                total=self._call_seconds + GRACE_SECONDS, sock_connect=CONNECT_SECONDS
            )
            self._http = aiohttp.ClientSession(
                headers=headers, timeout=timeout, proxy=environment_proxy(self._url)
            )
            self._loop = loop
        if loop is not self._loop:
            raise RuntimeError(
                "a remote environment is used from one event loop: either reset and step, or areset"
                " and astep; not both"
            )
        return self._http

    def _max_seconds(self) -> float:
        """Return how long one synchronous call may take with all its attempts."""
        return ATTEMPTS * (self._call_seconds + 2 * GRACE_SECONDS)


async def _read_bounded(response: aiohttp.ClientResponse, method: str) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise RemoteEnvError(
                "protocol", f"the answer to {method} has more than {MAX_ANSWER_BYTES} bytes"
            )
    return bytes(data)


def _decode_error(answer: dict[str, Any], status: int) -> RemoteEnvError:
    fields = answer.get("error")
    if not isinstance(fields, dict):
        fields = {}
    code = str(fields.get("code"))
    message = str(fields.get("message", f"status {status}"))[:500]
    return RemoteEnvError(code if code in CODES else "protocol", message)


def _text(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise RemoteEnvError("protocol", f"the answer has no text {name!r}")
    return value


def _info(answer: dict[str, Any]) -> Info:
    info = answer.get("info")
    if not isinstance(info, dict):
        raise RemoteEnvError("protocol", "the answer has no info")
    return info
