"""An SGLang server without a model, which behaves as real ones were seen to, each documented trap
selectable.

Its "weights" are one number, read from PATH/value.txt. Token t of a sequence is that number modulo
1000 plus t; the logprob of a token is a hash of (position, token), and a little of (number,
position, token) too, so what was computed by which weights can be told afterwards. The little is
what a step at learning rate 1e-6 changes, and far less than what bfloat16 rounds: the trainer's
logprobs differ from the server's by more than one version's from another's. The prefix cache keeps
those numbers.

Traps:
  retract_crashes      a retract pause, then a flushing update: the process is gone (0.5.15)
  in_place_flush       a flushing update amid frozen requests: 400, though the weights did change;
                       weight_version did not (0.5.23)
  update_half          an update fails with 400 and leaves weights that nobody knows
  update_says_yes      an update says success and the new version, and keeps the old weights (names
                       were missing)
  update_says_yes_to_experts   the same, but only the experts' down projections are kept
  other_bytes          one tensor is not what the other servers have after the same update
  flush_lies           flush_cache is accepted and does nothing
  slow_health          /health_generate takes half a second
  slow_probe           a prompt is scored in 0.3 s, while other requests go on
  busy_health          /health_generate says 503, and so do two requests in three, with Retry-After
  fails_fast           /generate says 500 at once, unless it is a probe of the weights
  rejects_fast         /generate says 400 at once, unless it is a probe of the weights
  hangs                everything but /server_info is accepted and never answered
Always so, as in SGLang: an unpaused update waits for all running requests; a request during a pause
is held; abort matches rids by prefix; /update_weight_version aborts everything; after an update
served_model_name is the new path; no weight_versions before 0.5.23.
"""

import asyncio
import contextlib
import hashlib
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy
from aiohttp import web

from rome.engine.client import Engine

TOKEN_SECONDS = 0.004
STEP = 0.006  # nats; two versions differ by a third of this in the mean
ROUNDING = 0.06  # nats; a fourth of this is the trainer's mean distance to the server
NORM = "model.norm.weight"
TENSORS = {  # of a checkpoint -> what the server fuses it into
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.self_attn.v_proj.weight": "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight": "model.layers.0.mlp.experts.w13_weight",
    "model.layers.0.mlp.experts.1.down_proj.weight": "model.layers.0.mlp.experts.w2_weight",
    "model.layers.1.mlp.gate_proj.weight": "model.layers.1.mlp.gate_up_proj.weight",
}
EXPERTS = "model.layers.0.mlp.experts.w2_weight"


def logprobs_of(value: int, ids: list[int]) -> list[float]:
    """What a server with weights `value` says of these ids; None never appears: entry 0 is the
    trainer's placeholder.
    """
    return [0.0] + [_logprob(value, place, token) for place, token in enumerate(ids) if place]


def trainer_logprobs_of(value: int, ids: list[int]) -> list[float]:
    """What the trainer says of these ids with the same weights: bfloat16 rounds elsewhere."""
    return [
        logprob + ROUNDING * (_share("trainer", value, place, token) - 0.5)
        for place, (token, logprob) in enumerate(zip(ids, logprobs_of(value, ids), strict=True))
    ]


def _logprob(value: int, place: int, token: int) -> float:
    return -9.0 * _share(place, token) - STEP * (1.0 + _share(value, place, token))


def _share(*parts: object) -> float:
    """A number from 0 to 1 that the parts decide."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32


def make_weights(directory: pathlib.Path, value: int) -> pathlib.Path:
    """A checkpoint: the number, and tensors of which all but the norm depend on it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "value.txt").write_text(str(value))
    tensors = {
        name: np.full((4, 2), 1.0 if name == NORM else value, ml_dtypes.bfloat16)
        for name in (*TENSORS, NORM)
    }
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


class FakeSGLang:
    """One server. `bodies`: everything that was sent, (route, body), in order."""

    def __init__(
        self, version: str = "0.5.23", traps: tuple[str, ...] = (), value: int = 1, **info
    ):
        self.sglang_version, self.traps, self.value, self.info = version, set(traps), value, info
        self.experts_value = value
        self.weight_version, self.model_path = "default", "start"
        self.paused: str | None = None
        self.bodies: list[tuple[str, dict]] = []
        self.running: dict[str, dict] = {}
        self.cache: dict[tuple, int] = {}  # (extra_key, ids) -> weights that computed it
        self.stale_hits = 0  # prefixes of other weights than the current ones that were found
        self.released: set[str] = set()
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> "FakeSGLang":
        app = web.Application()
        for name in (
            "generate",
            "pause_generation",
            "continue_generation",
            "abort_request",
            "update_weights_from_disk",
            "server_info",
            "model_info",
            "health_generate",
            "release_memory_occupation",
            "resume_memory_occupation",
            "update_weight_version",
            "weights_checker",
        ):
            app.router.add_route("*", "/" + name, self._guarded(getattr(self, name)))
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        return self

    async def crash(self) -> None:
        """The process is gone, and with it everything in memory. `start` takes the same port."""
        self.running, self.cache, self.paused, self.weight_version, self.value = (
            {},
            {},
            None,
            "default",
            1,
        )
        runner, self._runner = self._runner, None
        if runner is not None:
            for connection in list(runner.server.connections):
                connection.force_close()
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    def _guarded(self, handler):
        async def handle(http):
            text = await http.text()
            body = json.loads(text) if text else {}
            self.bodies.append((http.path, body))
            if "hangs" in self.traps:
                await asyncio.sleep(3600)
            return await handler(body)

        return handle

    # -- routes
    # ---------------------------------------------------------------------------------------------

    async def server_info(self, body):
        return web.json_response(
            {"version": self.sglang_version, "tokenizer_worker_num": 1, **self.info}
        )

    async def model_info(self, body):
        return web.json_response(
            {
                "weight_version": self.weight_version,
                "model_path": self.model_path,
                "served_model_name": self.model_path,
            }
        )

    async def health_generate(self, body):
        if "slow_health" in self.traps:
            await asyncio.sleep(0.5)
        return web.Response(status=503 if "busy_health" in self.traps else 200)

    async def generate(self, body):
        generated = [route for route, _ in self.bodies].count("/generate")
        if "busy_health" in self.traps and generated % 3:
            return web.json_response(
                {"error": {"message": "queue full"}}, status=503, headers={"Retry-After": "0.05"}
            )
        is_probe = body["logprob_start_len"] >= 0
        if "fails_fast" in self.traps and not is_probe:
            return web.json_response({"error": {"message": "CUDA error"}}, status=500)
        if "rejects_fast" in self.traps and not is_probe:
            return web.json_response({"error": {"message": "context of 8"}}, status=400)
        while self.paused or self.released:
            await asyncio.sleep(0.005)
        ids, params, rid = body["input_ids"], body["sampling_params"], body["rid"]
        request = self.running[rid] = {"ids": [], "logprobs": [], "versions": [], "finish": None}
        try:
            score_from = body["logprob_start_len"]
            if score_from >= 0 and "slow_probe" in self.traps:
                await asyncio.sleep(0.3)
            computed = self._computed_by(body, ids if score_from < 0 else ids[:score_from])
            while request["finish"] is None and len(request["ids"]) < params["max_new_tokens"]:
                await asyncio.sleep(TOKEN_SECONDS)
                if self.paused is None and request["finish"] is None:
                    place = len(ids) + len(request["ids"])
                    token = self.value % 1000 + place
                    request["ids"].append(token)
                    request["logprobs"].append(
                        _logprob(self.value if computed is None else computed, place, token)
                    )
                    request["versions"].append(self.weight_version)
            self.cache[body.get("extra_key"), tuple(ids)] = self.value
            return web.json_response(
                self._answer(
                    request,
                    ids,
                    request["finish"] or {"type": "length", "length": params["max_new_tokens"]},
                    score_from >= 0,
                )
            )
        finally:
            self.running.pop(rid, None)

    def _computed_by(self, body, ids):
        """The weights that the cached prefix was computed by; None when there is none.

        This is how a stale cache poisons what follows.
        """
        for (key, held), value in self.cache.items():
            if key == body.get("extra_key") and held and tuple(ids[: len(held)]) == held:
                self.stale_hits += value != self.value
                return value
        return None

    def _answer(self, request, ids, finish, scored):
        versions = request["versions"]
        meta = {
            "finish_reason": finish,
            "weight_version": self.weight_version,
            "cached_tokens": 0,
            "output_token_logprobs": [
                [logprob, token, None]
                for logprob, token in zip(request["logprobs"], request["ids"], strict=True)
            ],
        }
        if scored:
            logprobs = logprobs_of(self.value, ids)
            meta["input_token_logprobs"] = [
                [None, ids[0], None],
                *([one, token, None] for one, token in zip(logprobs[1:], ids[1:], strict=True)),
            ]
        if self.sglang_version >= "0.5.23":
            borders = [i for i in range(len(versions)) if i == 0 or versions[i] != versions[i - 1]]
            meta["weight_versions"] = [
                {"version": versions[a], "start": a, "end": b}
                for a, b in zip(borders, [*borders[1:], len(versions)], strict=False)
            ]
        return {"text": "", "output_ids": request["ids"], "meta_info": meta}

    async def pause_generation(self, body):
        self.paused = body["mode"]
        if self.paused == "abort":
            self._abort("")
            while self.running:
                await asyncio.sleep(0.005)
        return web.json_response({"message": "paused", "status": "ok"})

    async def continue_generation(self, body):
        self.paused = None
        return web.json_response({"message": "continued", "status": "ok"})

    async def abort_request(self, body):
        self._abort("" if body.get("abort_all") else body["rid"])
        return web.Response()

    def _abort(self, prefix):
        for rid, request in self.running.items():
            if rid.startswith(prefix):
                request["finish"] = {"type": "abort", "message": "Aborted"}

    async def update_weights_from_disk(self, body):
        while self.running and self.paused is None:  # trap 1: it waits for all of them
            await asyncio.sleep(0.005)
        if "weights" in self.released:
            return web.json_response(
                {"success": False, "message": "memory is released"}, status=400
            )
        if "retract_crashes" in self.traps and self.paused == "retract" and body["flush_cache"]:
            self.crashing = asyncio.ensure_future(self.crash())
            await asyncio.sleep(3600)
        if "update_half" in self.traps:
            self.value = -7
            return web.json_response({"success": False, "message": "size mismatch"}, status=400)
        if "update_says_yes" not in self.traps:
            self.value = int((pathlib.Path(body["model_path"]) / "value.txt").read_text())
            if "update_says_yes_to_experts" not in self.traps:
                self.experts_value = self.value
        if (
            "in_place_flush" in self.traps
            and self.paused == "in_place"
            and body["flush_cache"]
            and self.running
        ):
            return web.json_response(
                {"success": False, "message": "cannot flush: requests are running"}, status=400
            )
        if body["flush_cache"] and "flush_lies" not in self.traps:
            self.cache.clear()
        self.weight_version, self.model_path = body["weight_version"], body["model_path"]
        return web.json_response(
            {"success": True, "message": "ok", "num_paused_requests": len(self.running)}
        )

    async def weights_checker(self, body):
        """The hashes of two ranks; the experts' tensors change on the second one only."""
        if self.sglang_version < "0.5.15":
            return web.Response(status=404)
        names = {*TENSORS.values(), NORM}
        sums = [{name: self._sum(name, rank) for name in names} for rank in range(2)]
        return web.json_response({"success": True, "ranks": [{"checksums": one} for one in sums]})

    def _sum(self, name, rank):
        if name == NORM or ("experts" in name and rank == 0):
            return f"{name} of any weights"
        if name == EXPERTS:
            return f"{name} {self.experts_value} {'other_bytes' in self.traps}"
        return f"{name} {self.value}"

    async def update_weight_version(self, body):
        self._abort("")
        self.weight_version = body["new_version"]
        return web.json_response({"success": True})

    async def release_memory_occupation(self, body):
        if self.running:
            return web.json_response({"error": {"message": "not idle"}}, status=400)
        self.released |= set(body["tags"])
        self.value = (
            -9 if "weights" in body["tags"] else self.value
        )  # what the memory holds afterwards is undefined
        return web.json_response(None)

    async def resume_memory_occupation(self, body):
        self.released -= set(body["tags"])
        return web.json_response(None)


@contextlib.asynccontextmanager
async def fakes(*servers: FakeSGLang, **options):
    """Starts the servers; gives an engine for each."""
    async with contextlib.AsyncExitStack() as stack:
        engines = []
        for server in servers:
            await server.start()
            stack.push_async_callback(server.crash)
            engines.append(
                await stack.enter_async_context(
                    Engine(server.url, **{"dead_after_seconds": 0.2} | options)
                )
            )
        yield engines
