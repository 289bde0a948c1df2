"""A GEM environment on another machine, behind envs.gem.server (or any service that speaks ROCK's
REST interface for GEM).

env = RemoteEnv("http://host:8080", "game/sokoban", token, num_boxes=2)
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
from envs.gem.server import ERRORS, PREFIX
from envs.rock import SandboxError
from envs.rock.sync import run

MAX_ANSWER_BYTES = 16 << 20
ATTEMPTS = 4  # of a reset or step whose connection broke; the call_id makes a repetition harmless
_GRACE_S = 30.0
CODES = frozenset(ERRORS) | {"connection", "protocol"}


class RemoteEnvError(SandboxError):
    """A call that gave no result: infrastructure's fault or the caller's, never the policy's.

    `code` is one of CODES.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class RemoteTask:
    """What the environment said that it plays."""

    name: str
    family: str
    seed: int | None


class RemoteEnv(Env):
    """Made on the server at the first reset.

    After the server closed it for idleness, reset makes it anew; a step then fails.
    """

    def __init__(
        self,
        url: str,
        remote_id: str,
        token: str | None = None,
        call_seconds: float = 300.0,
        **kwargs: Any,
    ) -> None:
        """
        Args:
          remote_id: the environment's id on the server.
          call_seconds: as long as the server may take for one call.
          kwargs: of the environment's constructor, plain JSON values.
        """
        self.env_id = self._remote_id = remote_id  # make gives it the name that it has here
        self._url, self._token, self._call_seconds, self._kwargs = (
            url.rstrip("/"),
            token,
            call_seconds,
            kwargs,
        )
        self._sandbox_id: str | None = None
        self._http: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.task, self.tools = RemoteTask(remote_id, remote_id, None), []

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        return run(self.areset(seed), self._bound())

    def step(self, action: str) -> StepResult:
        return run(self.astep(action), self._bound())

    def close(self) -> None:
        run(self.aclose(), self._bound())

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        for fresh in (self._sandbox_id is None, True):
            if fresh:
                wanted = {"env_id": self._remote_id} | (
                    {"kwargs": self._kwargs} if self._kwargs else {}
                )
                self._sandbox_id = self._text(await self._post("make", wanted), "sandbox_id")
            try:
                answer = await self._turn("reset", {} if seed is None else {"seed": seed})
                break
            except RemoteEnvError as error:
                if error.code != "unknown_instance" or fresh:
                    raise
        info = self._info(answer)
        self.task = RemoteTask(
            str(info.get("task", self._remote_id)),
            str(info.get("family", self._remote_id)),
            info.get("seed"),
        )
        self.tools = info.get("tools", [])
        return self._text(answer, "observation"), info

    async def astep(self, action: str) -> StepResult:
        if self._sandbox_id is None:
            raise RuntimeError(f"remote environment {self.env_id} has no episode; call reset()")
        answer = await self._turn("step", {"action": action})
        reward = answer.get("reward")
        if not isinstance(reward, (int, float)) or not all(
            isinstance(answer.get(name), bool) for name in ("terminated", "truncated")
        ):
            raise RemoteEnvError(
                "protocol",
                f"the answer to step has reward {reward!r}, terminated"
                f" {answer.get('terminated')!r}",
            )
        return (
            self._text(answer, "observation"),
            float(reward),
            answer["terminated"],
            answer["truncated"],
            self._info(answer),
        )

    async def aclose(self) -> None:
        sandbox_id, self._sandbox_id = self._sandbox_id, None
        try:
            if sandbox_id is not None:
                await self._post("close", {"sandbox_id": sandbox_id})
        except RemoteEnvError as error:
            if error.code not in (
                "unknown_instance",
                "connection",
            ):  # gone already, or it will be closed for idleness
                raise
        finally:
            http, self._http = self._http, None
            if http is not None:
                await http.close()

    def spawn(self, same_state: bool = False, **kwargs: Any) -> RemoteEnv:
        """Another environment on the same server.

        The running episode cannot be copied: same_state is refused.
        """
        if same_state:
            raise NotImplementedError(
                "a remote episode cannot be copied; spawn(same_state=False) and reset"
            )
        return RemoteEnv(
            self._url,
            self._remote_id,
            self._token,
            self._call_seconds,
            **{**self._kwargs, **kwargs},
        )

    # -- the wire
    # ---------------------------------------------------------------------------------------------

    async def _turn(self, method: str, fields: dict[str, Any]) -> dict[str, Any]:
        """A reset or step, repeated with the same call_id while the connection breaks."""
        body = {"sandbox_id": self._sandbox_id, "call_id": secrets.token_hex(8), **fields}
        for attempt in range(ATTEMPTS):
            try:
                return await self._post(method, body)
            except RemoteEnvError as error:
                if error.code != "connection" or attempt == ATTEMPTS - 1:
                    raise
                await asyncio.sleep(random.uniform(0.5, 1.0) * 0.2 * 2**attempt)
        raise AssertionError("unreachable")

    async def _post(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request. Raises RemoteEnvError with the server's code, "connection" or "protocol"."""
        http = self._session()
        try:
            async with http.post(
                f"{self._url}{PREFIX}/{method}", json=body, allow_redirects=False
            ) as response:
                data = bytearray()
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > MAX_ANSWER_BYTES:
                        raise RemoteEnvError(
                            "protocol",
                            f"the answer to {method} has more than {MAX_ANSWER_BYTES} bytes",
                        )
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise RemoteEnvError(
                "connection", f"{method} at {self._url}: {type(error).__name__}: {error}"
            ) from error
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RemoteEnvError(
                "protocol",
                f"{method} at {self._url} answered {response.status} with what is not JSON",
            ) from error
        if not isinstance(answer, dict):
            raise RemoteEnvError(
                "protocol", f"{method} at {self._url} answered with a JSON {type(answer).__name__}"
            )
        if response.status != 200:
            error = answer.get("error")
            told = error if isinstance(error, dict) else {}
            code = str(told.get("code"))
            raise RemoteEnvError(
                code if code in CODES else "protocol",
                str(told.get("message", f"status {response.status}"))[:500],
            )
        return answer

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._http is None:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            self._http = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._call_seconds + _GRACE_S, sock_connect=10),
            )
            self._loop = loop
        if loop is not self._loop:
            raise RuntimeError(
                "a remote environment is used from one event loop: either reset and step, or areset"
                " and astep; not both"
            )
        return self._http

    def _bound(self) -> float:
        return ATTEMPTS * (self._call_seconds + 2 * _GRACE_S)

    @staticmethod
    def _text(answer: dict[str, Any], name: str) -> str:
        if not isinstance(answer.get(name), str):
            raise RemoteEnvError("protocol", f"the answer has no text {name!r}")
        return answer[name]

    @staticmethod
    def _info(answer: dict[str, Any]) -> Info:
        if not isinstance(answer.get("info"), dict):
            raise RemoteEnvError("protocol", "the answer has no info")
        return answer["info"]
