"""ROCK's REST interface for GEM: make, reset, step, close and list under /apis/v1/envs/gem.

    service = GemService(token)
    service.mount(application)  # an aiohttp application that also serves other routes
    web.run_app(service.standalone(), host=..., port=...)  # or alone

Any registered environment can be made. Requests and responses are ROCK's, in which a running
environment is named by its `sandbox_id`, with three additions. `make` takes constructor arguments
as `kwargs`. `reset` and `step` take a `call_id`: a repeated call with the id of the last one gets
the last response instead of a second turn. Every failure is {"error": {"code", "message"}} with a
code of ERRORS.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from typing import Any

from aiohttp import web

from envs.gem.core import StepResult, make, registered
from envs.gem.server_calls import call_env, own_coroutine, run_in_thread
from envs.gem.server_json import ERRORS, Field, GemError, encode, parse_body, read_body
from envs.rock import AgentFault, SandboxError

PREFIX = "/apis/v1/envs/gem"
CLOSE_SECONDS = 60.0  # that the end of the service waits for environments to close
MAX_MESSAGE_CHARS = 500
MAX_SEED = 1 << 63
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
# members of the requests
_MAKE = {"env_id": Field(str), "kwargs": Field(dict, default={}, required=False)}
_RESET = {
    "sandbox_id": Field(str),
    "seed": Field(int, default=None, required=False),
    "call_id": Field(str, default="", required=False),
}
_STEP = {
    "sandbox_id": Field(str),
    "action": Field(str),
    "call_id": Field(str, default="", required=False),
}
_CLOSE = {"sandbox_id": Field(str)}


@dataclasses.dataclass
class _Instance:
    """One running environment. The lock is held while it works, so its calls queue up."""

    env_id: str
    env: Any
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    used: float = dataclasses.field(default_factory=time.monotonic)
    last: tuple[str, bytes] | None = None  # call_id and response of the last call, if it had one


class GemService:
    """Serves environments to callers that know the token.

    Environments with an `astep` of their own run on the server's event loop, others each in a
    thread.

    Args:
      token: what callers send as "Authorization: Bearer TOKEN"; may be None with anonymous=True.
      anonymous: admit everybody who reaches the port.
      allow: names of the environments that may be made; None for all that are registered.
      max_envs: environments that may run at the same time.
      idle_seconds: an environment that gets no call for so long is closed.
      call_seconds: limit of one call, which includes waiting for the environment's earlier call. An
        environment that exceeds it is given up.
      max_body_bytes: size of a request.

    Raises:
      ValueError: there is no token, and anonymous is False.
    """

    def __init__(
        self,
        token: str | None,
        *,
        anonymous: bool = False,
        allow: Collection[str] | None = None,
        max_envs: int = 1024,
        idle_seconds: float = 600.0,
        call_seconds: float = 300.0,
        max_body_bytes: int = 1 << 20,
    ) -> None:
        if not token and not anonymous:
            raise ValueError(
                "GemService got no token; pass one, or anonymous=True where everyone who reaches"
                " the port may use it"
            )
        self._token = token.encode() if token and not anonymous else None
        self._allow = allow
        self._max_envs = max_envs
        self._idle_seconds = idle_seconds
        self._call_seconds = call_seconds
        self._max_body_bytes = max_body_bytes
        self._instances: dict[str, _Instance] = {}
        self._being_made = 0
        self._closing: set[asyncio.Task[None]] = set()

    # -- as an aiohttp application

    def app(self) -> web.Application:
        """Return the routes without their prefix, for `add_subapp`."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_post("/make", self._make)
        app.router.add_post("/reset", self._reset)
        app.router.add_post("/step", self._step)
        app.router.add_post("/close", self._close)
        app.router.add_get("/list", self._list)
        app.router.add_post("/list", self._list)  # ROCK's own clients post
        app.cleanup_ctx.append(self._lifetime)
        return app

    def mount(self, application: web.Application) -> None:
        """Add the service to an application, under PREFIX."""
        application.add_subapp(PREFIX, self.app())

    def standalone(self) -> web.Application:
        """Return an application that serves nothing else."""
        application = web.Application()
        self.mount(application)
        return application

    async def _lifetime(self, _: web.Application) -> AsyncIterator[None]:
        reaper = asyncio.create_task(self._close_idle())
        yield
        reaper.cancel()
        for sandbox_id in list(self._instances):
            self._dismiss(sandbox_id)
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_SECONDS)

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check the token, and turn every failure into one of ERRORS."""
        try:
            self._check_token(request)
            return await handler(request)
        except GemError as error:
            return _error_response(error.code, str(error))
        except web.HTTPException as error:
            code = _HTTP_CODES.get(error.status, "bad_request")
            return _error_response(code, f"{request.method} {request.path}: {error.reason}")
        except Exception as error:  # a fault of ours, whose details are withheld
            return _error_response("internal", f"the service failed: {type(error).__name__}")

    def _check_token(self, request: web.Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            raise GemError(
                "unauthorized",
                "the request has no valid token; send 'Authorization: Bearer <token>'",
            )

    async def _body(self, request: web.Request, fields: dict[str, Field]) -> dict[str, Any]:
        return parse_body(await read_body(request, self._max_body_bytes), fields)

    # -- the calls

    async def _make(self, request: web.Request) -> web.Response:
        body = await self._body(request, _MAKE)
        env_id = body["env_id"]
        if env_id not in self._env_ids():
            raise GemError(
                "unknown_env",
                f"environment id {env_id[:100]!r} is unknown here; GET {PREFIX}/list tells those"
                " that are known",
            )
        if len(self._instances) + self._being_made >= self._max_envs:
            raise GemError("too_many", f"{self._max_envs} environments are running; close one")
        self._being_made += 1
        try:
            env = await self._make_env(env_id, body["kwargs"])
        finally:
            self._being_made -= 1
        # hard to guess, since it is all that keeps one caller from another's environment
        sandbox_id = secrets.token_hex(16)
        self._instances[sandbox_id] = _Instance(env_id, env)
        return _json_response({"sandbox_id": sandbox_id})

    async def _make_env(self, env_id: str, kwargs: dict[str, Any]) -> Any:
        build = functools.partial(make, env_id, **kwargs)
        making = asyncio.ensure_future(run_in_thread(build))
        done, _ = await asyncio.wait({making}, timeout=self._call_seconds)
        if not done:
            self._start_closing(_close_when_made(making))
            raise GemError("timeout", f"{env_id} was not made within {self._call_seconds:g} s")
        return _result(making, arguments_by_caller=True)

    async def _reset(self, request: web.Request) -> web.Response:
        body = await self._body(request, _RESET)
        seed = body["seed"]
        if seed is not None and not 0 <= seed < MAX_SEED:
            raise GemError("bad_request", f"seed is {str(seed)[:40]}; it is between 0 and 2^63 - 1")
        return await self._call(body, "reset", seed, _describe_reset)

    async def _step(self, request: web.Request) -> web.Response:
        body = await self._body(request, _STEP)
        return await self._call(body, "step", body["action"], _describe_step)

    async def _close(self, request: web.Request) -> web.Response:
        body = await self._body(request, _CLOSE)
        sandbox_id = body["sandbox_id"]
        self._find(sandbox_id)
        await asyncio.wait({self._dismiss(sandbox_id)}, timeout=self._call_seconds)
        return _json_response({"sandbox_id": sandbox_id})

    async def _list(self, _: web.Request) -> web.Response:
        return _json_response({"env_id": self._env_ids()})

    def _env_ids(self) -> list[str]:
        return [env_id for env_id in registered() if self._allow is None or env_id in self._allow]

    # -- instances

    async def _call(
        self,
        body: dict[str, Any],
        method: str,
        argument: Any,
        describe: Callable[[Any], dict[str, Any]],
    ) -> web.Response:
        """Carry out a reset or step once the environment's earlier calls are done.

        An environment that takes too long is given up.
        """
        sandbox_id = body["sandbox_id"]
        call_id = body["call_id"]
        instance = self._find(sandbox_id)
        deadline = time.monotonic() + self._call_seconds
        await self._lock(instance)
        try:
            if self._instances.get(sandbox_id) is not instance:
                raise GemError("unknown_instance", f"environment {sandbox_id} was closed meanwhile")
            if call_id and instance.last and instance.last[0] == call_id:
                _, data = instance.last
                return _raw_response(data)
            work = asyncio.ensure_future(call_env(instance.env, method, argument))
            done, _ = await asyncio.wait({work}, timeout=max(deadline - time.monotonic(), 0.0))
            if not done:
                if own_coroutine(instance.env, method):  # a thread cannot be cancelled
                    work.cancel()
                if self._instances.get(sandbox_id) is instance:
                    self._dismiss(sandbox_id, after=work)
                else:  # closed meanwhile, by a call that waits for the lock
                    await asyncio.wait({work}, timeout=CLOSE_SECONDS)
                raise GemError(
                    "timeout",
                    f"{method} took more than {self._call_seconds:g} s; the environment was"
                    " given up",
                )
            result = _failed_step(work) if method == "step" else None
            data = _encode_result(instance.env_id, method, result or _result(work), describe)
            instance.last = (call_id, data) if call_id else None
            return _raw_response(data)
        finally:
            instance.used = time.monotonic()
            instance.lock.release()

    async def _lock(self, instance: _Instance) -> None:
        try:
            await asyncio.wait_for(instance.lock.acquire(), self._call_seconds)
        except TimeoutError:
            raise GemError(
                "timeout",
                f"the environment was still at an earlier call after {self._call_seconds:g} s",
            ) from None

    def _find(self, sandbox_id: str) -> _Instance:
        if sandbox_id not in self._instances:
            raise GemError(
                "unknown_instance",
                f"environment {sandbox_id[:64]!r} is not running: it was never made, was closed, or"
                " was idle for too long",
            )
        return self._instances[sandbox_id]

    def _dismiss(
        self, sandbox_id: str, after: asyncio.Future[Any] | None = None
    ) -> asyncio.Task[None]:
        """Forget an environment now, and close it when its running call has ended."""
        instance = self._instances.pop(sandbox_id)
        return self._start_closing(_close_instance(instance, after))

    def _start_closing(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that the end of the service waits for, up to CLOSE_SECONDS."""
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _close_idle(self) -> None:
        while True:
            await asyncio.sleep(min(self._idle_seconds / 4, 30.0))
            oldest = time.monotonic() - self._idle_seconds
            for sandbox_id, instance in list(self._instances.items()):
                if instance.used < oldest and not instance.lock.locked():
                    self._dismiss(sandbox_id)


async def _close_instance(instance: _Instance, after: asyncio.Future[Any] | None) -> None:
    """Close an environment once a call that was given up has ended, or hangs for good.

    An environment whose `close` fails is given up all the same.
    """
    if after is not None:
        await asyncio.wait({after}, timeout=CLOSE_SECONDS)
    async with instance.lock:
        with contextlib.suppress(Exception):
            await call_env(instance.env, "close")


async def _close_when_made(making: asyncio.Future[Any]) -> None:
    """Close an environment that was made too late."""
    with contextlib.suppress(Exception):
        await call_env(await making, "close")


def _failed_step(done: asyncio.Future[Any]) -> StepResult | None:
    """Return the last step of an episode whose agent broke its sandbox; None for any other end.

    It is no error of the service: callers leave those episodes out.
    """
    if done.cancelled() or not isinstance(fault := done.exception(), AgentFault):
        return None
    note = f"{type(fault).__name__}: {fault}"
    info = {"ending": "failure", "status": "tool_error", "use_tool": False, "note": note}
    return "", 0.0, True, False, info


def _result(done: asyncio.Future[Any], arguments_by_caller: bool = False) -> Any:
    """Return the result of an environment's work, or raise its error as a GemError."""
    if done.cancelled():
        raise GemError("infrastructure", "the environment's work was cancelled")
    error = done.exception()
    if error is None:
        return done.result()
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SandboxError):
        raise GemError("infrastructure", message) from error
    if arguments_by_caller and isinstance(error, (ValueError, TypeError)):
        raise GemError("bad_request", message) from error
    raise GemError("env_error", message) from error


def _describe_reset(result: Any) -> dict[str, Any]:
    observation, info = result
    return {"observation": observation, "info": info}


def _describe_step(result: Any) -> dict[str, Any]:
    observation, reward, terminated, truncated, info = result
    return {
        "observation": observation,
        "reward": float(reward),
        "terminated": bool(terminated),
        "truncated": bool(truncated),
        "info": info,
    }


def _encode_result(
    env_id: str, method: str, result: Any, describe: Callable[[Any], dict[str, Any]]
) -> bytes:
    try:
        return encode(describe(result))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise GemError(
            "env_error", f"{env_id} answered {method} with a value that is not JSON: {error}"
        ) from error


def _error_response(code: str, message: str) -> web.Response:
    error = {"code": code, "message": message[:MAX_MESSAGE_CHARS]}
    return _json_response({"error": error}, ERRORS[code])


def _json_response(value: Any, status: int = 200) -> web.Response:
    return _raw_response(encode(value), status)


def _raw_response(data: bytes, status: int = 200) -> web.Response:
    return web.Response(body=data, status=status, content_type="application/json")
