"""ROCK's REST interface for GEM: make, reset, step, close and list under /apis/v1/envs/gem, for any
registered environment.

    service = GemService(token)
    service.mount(application)        # an aiohttp application that serves more; or web.run_app(service.standalone(), host=..., port=...)

Requests and answers are ROCK's (a running environment is named by `sandbox_id`), with three
additions: make takes constructor arguments as `kwargs`; reset and step take a `call_id`, and a
repeated call with the id of the last one gets the last answer instead of a second turn; and every
failure is {"error": {"code", "message"}} with a code of ERRORS.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from typing import Any

import numpy as np
from aiohttp import web

from envs.gem.core import Env, make, registered
from envs.rock import SandboxError

PREFIX = "/apis/v1/envs/gem"
ERRORS = {  # code -> HTTP status; the closed set
    "bad_request": 400,
    "unauthorized": 401,
    "unknown_env": 404,
    "unknown_instance": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "too_many": 429,
    "env_error": 500,
    "internal": 500,
    "infrastructure": 503,
    "timeout": 504,
}
BODY_SECONDS = 30.0  # a client that sends its request more slowly is cut off
CLOSE_SECONDS = 60.0
_MESSAGE_CHARS = 500


class GemError(Exception):
    """A failed call: what the client is told."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code if code in ERRORS else "internal"


@dataclasses.dataclass
class _Instance:
    """One running environment.

    The lock is held while it works, so its calls come one after the other.
    """

    env_id: str
    env: Any
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    used: float = dataclasses.field(default_factory=time.monotonic)
    last: tuple[str, bytes] | None = None  # call_id and answer of the last call that had one


class GemService:
    """Serves environments to whoever knows the token.

    Environments with `astep` run on the server's loop, others each in a thread.
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
        """
        Args:
          token: what clients send as "Authorization: Bearer token". None only together with
            anonymous=True.
          allow: the ids that may be made; None: all that are registered.
          idle_seconds: an environment that was not called for so long is closed.
          call_seconds: bound of one call, waiting for the environment's earlier call included. An
            environment that works longer is given up.
        """
        if not token and not anonymous:
            raise ValueError(
                "GemService got no token; pass one, or anonymous=True where everyone who reaches"
                " the port may use it"
            )
        self._token = None if anonymous else token.encode()
        self._allow, self._max_envs, self._idle_seconds = allow, max_envs, idle_seconds
        self._call_seconds, self._max_body_bytes = call_seconds, max_body_bytes
        self._instances: dict[str, _Instance] = {}
        self._being_made = 0
        self._farewells: set[asyncio.Task[None]] = set()

    # -- as an aiohttp application
    # ---------------------------------------------------------------------------------------------

    def app(self) -> web.Application:
        """The routes without their prefix, for `add_subapp`."""
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
        """Adds the service under PREFIX."""
        application.add_subapp(PREFIX, self.app())

    def standalone(self) -> web.Application:
        application = web.Application()
        self.mount(application)
        return application

    async def _lifetime(self, _: web.Application) -> AsyncIterator[None]:
        reaper = asyncio.create_task(self._reap())
        yield
        reaper.cancel()
        for sandbox_id in list(self._instances):
            self._dismiss(sandbox_id)
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=CLOSE_SECONDS)

    @web.middleware
    async def _guard(
        self, http: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Lets in who knows the token, and turns every failure into one of ERRORS."""
        try:
            if self._token is not None:
                given = http.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
                if not hmac.compare_digest(given, b"Bearer " + self._token):
                    raise GemError(
                        "unauthorized",
                        "the request has no valid token; send 'Authorization: Bearer <token>'",
                    )
            return await handler(http)
        except GemError as error:
            return _answer(
                {"error": {"code": error.code, "message": str(error)[:_MESSAGE_CHARS]}},
                ERRORS[error.code],
            )
        except web.HTTPException as error:
            code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(
                error.status, "bad_request"
            )
            return _answer(
                {
                    "error": {
                        "code": code,
                        "message": f"{http.method} {http.path}: {error.reason}"[:_MESSAGE_CHARS],
                    }
                },
                ERRORS[code],
            )
        except Exception as error:  # ours: the client is told that it was, and no more
            return _answer(
                {
                    "error": {
                        "code": "internal",
                        "message": f"the service failed: {type(error).__name__}",
                    }
                },
                ERRORS["internal"],
            )

    # -- the calls
    # ---------------------------------------------------------------------------------------------

    async def _make(self, http: web.Request) -> web.Response:
        body = await self._body(http, env_id=str, kwargs=(dict, {}))
        env_id, kwargs = body["env_id"], body["kwargs"]
        if env_id not in self._ids():
            raise GemError(
                "unknown_env",
                f"environment id {env_id[:100]!r} is unknown here; GET {PREFIX}/list tells those"
                " that are known",
            )
        if len(self._instances) + self._being_made >= self._max_envs:
            raise GemError("too_many", f"{self._max_envs} environments are running; close one")
        self._being_made += 1
        try:
            making = asyncio.ensure_future(_in_thread(lambda: make(env_id, **kwargs)))
            done, _ = await asyncio.wait({making}, timeout=self._call_seconds)
            if not done:
                self._keep(self._unmake(making))
                raise GemError("timeout", f"{env_id} was not made within {self._call_seconds:g} s")
            env = _result(making, arguments_by_client=True)
        finally:
            self._being_made -= 1
        sandbox_id = secrets.token_hex(
            16
        )  # not guessable: it is all that tells one client's environments from another's
        self._instances[sandbox_id] = _Instance(env_id, env)
        return _answer({"sandbox_id": sandbox_id})

    async def _reset(self, http: web.Request) -> web.Response:
        body = await self._body(http, sandbox_id=str, seed=(int, None), call_id=(str, ""))
        if body["seed"] is not None and not 0 <= body["seed"] < 1 << 63:
            raise GemError(
                "bad_request", f"seed is {str(body['seed'])[:40]}; it is between 0 and 2^63 - 1"
            )

        def told(result: Any) -> dict[str, Any]:
            observation, info = result
            return {"observation": observation, "info": info}

        return await self._call(body, "reset", "areset", body["seed"], told)

    async def _step(self, http: web.Request) -> web.Response:
        body = await self._body(http, sandbox_id=str, action=str, call_id=(str, ""))

        def told(result: Any) -> dict[str, Any]:
            observation, reward, terminated, truncated, info = result
            return {
                "observation": observation,
                "reward": float(reward),
                "terminated": bool(terminated),
                "truncated": bool(truncated),
                "info": info,
            }

        return await self._call(body, "step", "astep", body["action"], told)

    async def _close(self, http: web.Request) -> web.Response:
        sandbox_id = (await self._body(http, sandbox_id=str))["sandbox_id"]
        self._find(sandbox_id)
        await asyncio.wait({self._dismiss(sandbox_id)}, timeout=self._call_seconds)
        return _answer({"sandbox_id": sandbox_id})

    async def _list(self, _: web.Request) -> web.Response:
        return _answer({"env_id": self._ids()})

    # -- instances
    # ---------------------------------------------------------------------------------------------

    async def _call(
        self,
        body: dict[str, Any],
        method: str,
        twin: str,
        argument: Any,
        told: Callable[[Any], dict[str, Any]],
    ) -> web.Response:
        """One reset or step, when the environment's earlier calls are done.

        What takes too long costs the client its environment.
        """
        sandbox_id, call_id = body["sandbox_id"], body["call_id"]
        instance = self._find(sandbox_id)
        deadline = time.monotonic() + self._call_seconds
        try:
            await asyncio.wait_for(instance.lock.acquire(), self._call_seconds)
        except TimeoutError:
            raise GemError(
                "timeout",
                f"the environment was still at an earlier call after {self._call_seconds:g} s",
            ) from None
        try:
            if self._instances.get(sandbox_id) is not instance:
                raise GemError("unknown_instance", f"environment {sandbox_id} was closed meanwhile")
            if call_id and instance.last and instance.last[0] == call_id:
                return web.Response(body=instance.last[1], content_type="application/json")
            work = asyncio.ensure_future(_work(instance.env, method, twin, argument))
            done, _ = await asyncio.wait({work}, timeout=max(deadline - time.monotonic(), 0.0))
            if not done:
                work.cancel()
                self._dismiss(sandbox_id, after=work)
                raise GemError(
                    "timeout",
                    f"{method} took more than {self._call_seconds:g} s; the environment was"
                    " given up",
                )
            try:
                data = _encode(told(_result(work)))
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise GemError(
                    "env_error",
                    f"{instance.env_id} answered {method} with what is no JSON: {error}",
                ) from error
            instance.last = (call_id, data) if call_id else None
            return web.Response(body=data, content_type="application/json")
        finally:
            instance.used = time.monotonic()
            instance.lock.release()

    async def _unmake(self, making: asyncio.Future[Any]) -> None:
        """Closes the environment that came too late."""
        with contextlib.suppress(Exception):
            await _work(await making, "close", "aclose")

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
        """Forgets the environment now, and closes it when its running call has ended."""
        instance = self._instances.pop(sandbox_id)

        async def farewell() -> None:
            if after is not None:
                await asyncio.wait({after})
            async with instance.lock:
                with contextlib.suppress(
                    Exception
                ):  # an environment that cannot be closed is gone all the same
                    await _work(instance.env, "close", "aclose")

        return self._keep(farewell())

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that runs on behind the answers; the service ends after it, or after
        CLOSE_SECONDS.
        """
        task = asyncio.create_task(coroutine)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
        return task

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(min(self._idle_seconds / 4, 30.0))
            too_old = time.monotonic() - self._idle_seconds
            for sandbox_id, instance in list(self._instances.items()):
                if instance.used < too_old and not instance.lock.locked():
                    self._dismiss(sandbox_id)

    def _ids(self) -> list[str]:
        return [env_id for env_id in registered() if self._allow is None or env_id in self._allow]

    async def _body(self, http: web.Request, **fields: Any) -> dict[str, Any]:
        """The request's JSON object with exactly these fields: name=type, or name=(type, default)."""
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in http.content.iter_any():
                    data += piece
                    if len(data) > self._max_body_bytes:
                        raise GemError(
                            "too_large", f"the request has more than {self._max_body_bytes} bytes"
                        )
            given = json.loads(data)
        except TimeoutError:
            raise GemError(
                "timeout", f"the request did not come within {BODY_SECONDS:g} s"
            ) from None
        except (ValueError, RecursionError) as error:
            raise GemError("bad_request", f"the request is not JSON: {str(error)[:100]}") from error
        if not isinstance(given, dict):
            raise GemError(
                "bad_request", f"the request is a JSON {type(given).__name__}; send an object"
            )
        if unknown := sorted(set(given) - set(fields)):
            raise GemError(
                "bad_request", f"unknown field {unknown[0][:60]!r}; known are {', '.join(fields)}"
            )
        body = {}
        for name, field in fields.items():
            kind, optional = (field[0], True) if isinstance(field, tuple) else (field, False)
            value = given.get(name)
            if value is None and optional:
                value = field[1]
            elif not isinstance(value, kind) or isinstance(value, bool):
                raise GemError("bad_request", f"field {name!r} must be of type {kind.__name__}")
            body[name] = value
        return body


async def _work(env: Any, method: str, twin: str, *arguments: Any) -> Any:
    """Calls the environment's own coroutine, or its method in a thread."""
    own = getattr(type(env), twin, None)
    if own is not None and own is not getattr(Env, twin):
        return await own(env, *arguments)
    call = getattr(env, method, None)
    return await _in_thread(call, *arguments) if call is not None else None


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs it in a daemon thread of its own: an environment that never returns takes no pool's
    place and does not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_exception(error) if error is not None else ended.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as raised:
            error = (
                RuntimeError("the environment raised StopIteration")
                if isinstance(raised, StopIteration)
                else raised
            )
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="gem-server-env", daemon=True).start()
    return await ended


def _result(done: asyncio.Future[Any], arguments_by_client: bool = False) -> Any:
    """The result, or the error as one of ERRORS."""
    if done.cancelled():
        raise GemError("infrastructure", "the environment's work was cancelled")
    error = done.exception()
    if error is None:
        return done.result()
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, SandboxError):
        raise GemError("infrastructure", told) from error
    if arguments_by_client and isinstance(error, (ValueError, TypeError)):
        raise GemError("bad_request", told) from error
    raise GemError("env_error", told) from error


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, sets and tuples as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    raise TypeError(f"a value of type {type(value).__name__}")


def _encode(value: Any) -> bytes:
    return json.dumps(value, default=_plain, allow_nan=False).encode()


def _answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=_encode(value), status=status, content_type="application/json")
