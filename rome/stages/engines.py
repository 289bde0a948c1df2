"""The inference engines of one stage: start them, publish weights to them, divide their devices.

Engines are servers named by URL, processes that are started here, or one thread of this process
(config.engine.device=inside). What samples knows no difference: all are engines of one pool.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from envs.rock.sync import loop
from rome.engine.client import Engine
from rome.engine.connection import UPDATE_SECONDS
from rome.engine.control import MEMORY_TAGS
from rome.engine.errors import EngineError
from rome.engine.handover import Handover, hand_over
from rome.engine.inside import InsideEngine
from rome.engine.mirror import MirrorClient
from rome.engine.pool import EnginePool
from rome.engine.process import ServerProcess, start_server
from rome.engine.publish import (
    RECOVERY_SECONDS,
    STRAGGLER_SECONDS,
    publish_weights,
    write_adapter,
    write_checkpoint,
)
from rome.engine.supervise import supervise
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import save_hf
from rome.model.sharding import engine_part
from rome.model.tokenizer import Chat
from rome.serve.programs import Shapes
from rome.stages.settings import split_urls
from rome.stages.waiting import wait_for_engines
from rome.train.devices import Division, engines_division
from rome.train.display import Display
from rome.train.state import TrainState
from rome.train.step import Learner
from rome.train.team import Team
from rome.train.workdir import ConfigError

# Any text will do whose tokens cannot be guessed: the probe's logprobs must depend on the weights.
PROBE = "Read the note: " + " ".join(str(number**2 % 1009) for number in range(200))
PROBE_TOKENS = 256
# The parts of a publication have deadlines of their own, which say more; this one is beyond them.
PUBLISH_SECONDS = UPDATE_SECONDS + STRAGGLER_SECONDS + RECOVERY_SECONDS + 60.0
CLOSE_SECONDS = 30.0
# Adapters that an embedded engine has room for: the one that samples, the next, and those that
# running requests have begun with.
ADAPTER_SLOTS = 4
# The largest accepted mean difference of the probe's logprobs in nats, by compute type. bfloat16
# rounds more than two platforms differ.
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
# The same, where engine and trainer are of two platforms: they sum and exponentiate otherwise.
PROBE_TOLERANCE_ACROSS = {"float32": 1e-3, "bfloat16": 0.1}


class Engines:
    """The engines that sample for one stage. Only the leader of a team talks to them.

    Args:
      config: of the experiment; `engine`, `max_context` are read.
      workdir: of the run; it gets the weights and the logs of embedded engines.
      model_config: of the model that is trained.
      learner: scores the probe that proves a publication.
      chat: renders the probe.
      team: the processes of this job.
      display: shows that engines are started.

    Raises:
      ConfigError: the engines cannot run where the config says.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        model_config: ModelConfig,
        learner: Learner,
        chat: Chat,
        team: Team,
        display: Display,
    ) -> None:
        self.config = config
        self.workdir = workdir
        self.weights = weights_directory(workdir)
        self.published: int | None = None  # version
        self.servers: list[ServerProcess] = []
        self._model_config = model_config
        self._learner = learner
        self._chat = chat
        self._team = team
        self._display = display
        self._pool: EnginePool | None = None
        self._supervisor: concurrent.futures.Future[Any] | None = None
        self._metrics: dict[str, float] = {}  # of the last publication
        self._inside: InsideEngine | None = None
        self._place: Mesh | jax.Device | None = None  # of the engine inside
        self._has_room = False  # whether the learner has the device of the engine inside
        self._base: pathlib.Path | None = None  # that embedded engines were started with
        self._sends_adapters = sends_adapters(config)
        self._division = self._divide()

    @property
    def pool(self) -> EnginePool:
        """The running engines.

        Raises:
          RuntimeError: before `start`, and in processes that do not lead.
        """
        if self._pool is None:
            raise RuntimeError("engines are used before they are started: an error of the program")
        return self._pool

    def start(self, state: TrainState) -> None:
        """Connect to the engines of the config, or start embedded ones with these weights."""
        if self._division.is_inside:
            self._start_inside(state)
            return
        urls = split_urls(self.config.engine.urls)
        if not urls:
            start = self.weights / "start"
            params, adapters = self._learner.to_publish(state.params)
            if self._sends_adapters:  # which are loaded by name, beside the base
                adapters = None
            save_hf(params, self._model_config, start, adapters=adapters)
            self._base = start
            if self._team.leads:
                urls = self._start_embedded(start)
        if self._team.leads:
            self._connect(urls)

    def publish(self, state: TrainState, keep: Collection[int] = ()) -> dict[str, float]:
        """Send the weights of `state` to every engine and prove that they have arrived.

        How it is proven is in `rome.engine.proof`. Nothing is sent where this version is published
        already.

        Args:
          state: the weights; `state.step` is their version.
          keep: earlier versions whose files stay on disk.

        Returns:
          Metrics of the publication: engines, seconds_paused, probe_error; bytes_published where
          files were written; and with mirrors seconds_transfer and bytes_transfer.
        """
        version = int(state.step)
        if version == self.published and not self._has_room:
            return self._metrics
        ids = self._chat.open(PROBE)[: min(PROBE_TOKENS, self.config.max_context - 1)]
        expected = self._learner.score_one(state.params, ids)
        uses_mirrors = bool(self.config.engine.mirrors)
        is_inside = self._division.is_inside
        source = self._hand_over(state) if is_inside else self._write(state, keep)

        def send() -> dict[str, float]:
            should_stop = self._team.wants_to_stop
            wait_for_engines(
                self.pool.take_back(), PUBLISH_SECONDS, "the end of lending", should_stop
            )
            publication = publish_weights(
                source,
                version,
                self.pool,
                probe_ids=ids,
                expected_logprobs=expected.tolist(),
                tolerance=self._tolerance(),
                mode=self.config.engine.pause,
                adapter=self._sends_adapters,
                base=self._base,
            )
            what = f"the publication of weights {version}"
            done = wait_for_engines(publication, PUBLISH_SECONDS, what, should_stop)
            metrics = {
                "engines": done.engines,
                "seconds_paused": done.seconds_pause,
                "probe_error": done.probe_error,
            }
            if isinstance(source, pathlib.Path):
                files = (path for path in source.rglob("*") if path.is_file())
                metrics["bytes_published"] = sum(path.stat().st_size for path in files)
            if uses_mirrors:
                metrics["seconds_transfer"] = done.seconds_transfer
                metrics["bytes_transfer"] = done.bytes_transfer
            return metrics

        self._metrics = self._team.share(f"weights {version}", send)
        if is_inside and keep:  # a resumed run scores samples of these versions
            self._write(state, keep)
        self.published = version
        self._has_room = False
        return self._metrics

    def make_room(self) -> None:
        """Give the learner the device for an update, where the engine is inside the trainer.

        `publish` ends it. Its requests wait until then.
        """
        if not self._division.is_inside or self._has_room:
            return
        engine = self.config.engine
        freeing = self.pool.suspend(engine.pause, () if engine.keep_memory else MEMORY_TAGS)
        what = "the pause of the engine"
        wait_for_engines(freeing, PUBLISH_SECONDS, what, self._team.wants_to_stop)
        if not self.pool.engines_in("updating"):
            raise EngineError("; ".join(self.pool.causes.values()))
        self._has_room = True

    def lend(self, count: int) -> None:
        """Give the devices of `count` engines to the learner; `publish` takes them back."""
        if self._team.leads:
            what = f"lending {count} engines"
            lending = self.pool.lend(count)
            wait_for_engines(lending, PUBLISH_SECONDS, what, self._team.wants_to_stop)

    def close(self) -> None:
        """Stop supervising, close connections and stop embedded engines, whatever raises first."""
        with contextlib.ExitStack() as ends:  # the last one entered ends first
            for server in self.servers:
                ends.callback(server.stop)
            if self._inside is not None:
                ends.callback(self._inside.stop)
            if self._pool is not None:
                closing = self._pool.close()
                ends.callback(wait_for_engines, closing, CLOSE_SECONDS, "closing connections")
            if self._supervisor is not None:
                ends.callback(self._supervisor.cancel)

    def _tolerance(self) -> float:
        """Return the tolerance of a proof; the platform of engines elsewhere is not known."""
        is_ours = self.servers or self._division.is_inside
        is_same = is_ours and self._division.engine_platform == jax.default_backend()
        table = PROBE_TOLERANCE if is_same else PROBE_TOLERANCE_ACROSS
        return table[self._model_config.dtype]

    def _divide(self) -> Division:
        engine = self.config.engine
        count = 0 if split_urls(engine.urls) else engine.count
        is_alone = self._team.count == 1
        try:
            division = engines_division(jax.default_backend(), engine.device, count, is_alone)
        except ValueError as error:
            raise ConfigError(f"{error}.") from None
        if division.is_inside:
            check_inside(self.config)
        if self._sends_adapters:
            check_adapters(self.config, division.is_inside)
        return division

    def _write(self, state: TrainState, keep: Collection[int]) -> pathlib.Path:
        params, adapters = self._learner.to_publish(state.params)
        if self._sends_adapters:
            assert adapters is not None, "a learner with adapters publishes them"
            version = int(state.step)
            if not self._team.leads:
                return self.weights / f"step_{version:06d}"
            return write_adapter(adapters, self.weights, version, set(keep))
        return write_checkpoint(
            params,
            self._model_config,
            self.weights,
            int(state.step),
            set(keep),
            delta=bool(self.config.engine.mirrors),
            adapters=adapters,
        )

    def _hand_over(self, state: TrainState) -> Handover:
        assert self._place is not None, "the engine inside has a place once it is started"
        return hand_over(self._learner.merged(state.params), self._model_config, self._place)

    def _start_inside(self, state: TrainState) -> None:
        """Start the engine as a thread of this process."""
        self._display.note("starting the engine inside the trainer")
        mesh = self._learner.mesh
        try:
            self._place = engine_part(mesh, self._model_config) or mesh.devices.flat[0]
        except ValueError as error:
            raise ConfigError(
                f"the engine inside the trainer takes config.mesh.expert and config.mesh.tensor:"
                f" {error}"
            ) from None
        if self._division.trainer_platform != "cpu":
            self._display.note(self._division.says)
        engine = self.config.engine
        shapes = Shapes(engine.slots, self.config.max_context, engine.cache_tokens)
        self._inside = InsideEngine(self._hand_over(state), shapes)
        self._inside.start(should_stop=self._team.wants_to_stop)
        self._pool = EnginePool([self._inside])

    def _start_embedded(self, start: pathlib.Path) -> list[str]:
        """Start the embedded engines; return their URLs."""
        count = self.config.engine.count
        self._display.note(
            f"starting {count} embedded engines" if count > 1 else "starting the embedded engine"
        )
        division = self._division
        if division.trainer_platform != "cpu":
            self._display.note(division.says)
        flags = [
            "--skip_tokenizer_init",
            f"--slots={self.config.engine.slots}",
            f"--cache_tokens={self.config.engine.cache_tokens}",
            f"--max_context={self.config.max_context}",
            f"--dtype={self._model_config.dtype}",
        ]
        if self._sends_adapters:
            lora = self.config.lora
            flags += [
                f"--max_loaded_loras={ADAPTER_SLOTS}",
                f"--max_lora_rank={lora.rank}",
                f"--lora_target_modules={lora.targets}",
            ]
        for number in range(count):
            log = self.workdir / ("engine.log" if number == 0 else f"engine_{number}.log")
            server = start_server(
                start,
                log,
                flags=flags,
                environment=division.engines[number],
                should_stop=self._team.wants_to_stop,
            )
            self.servers.append(server)
        return [server.url for server in self.servers]

    def _connect(self, urls: list[str]) -> None:
        """Open clients to the engines and supervise them."""
        mirrors = split_urls(self.config.engine.mirrors)
        engines = [
            Engine(
                url,
                model=self._model_config,
                mirror=MirrorClient(mirror) if mirror else None,
            )
            for url, mirror in itertools.zip_longest(urls, mirrors)
        ]
        restart = {server.url: server.restart for server in self.servers}
        self._pool = EnginePool(engines, restart=restart)
        self._supervisor = asyncio.run_coroutine_threadsafe(supervise(self._pool), loop())


def sends_adapters(config: ml_collections.ConfigDict) -> bool:
    """Return whether engines get the adapters alone, and not the weights with them."""
    return bool(config.lora.rank) and config.lora.publish == "adapter"


def check_adapters(config: ml_collections.ConfigDict, is_inside: bool) -> None:
    """Refuse what contradicts engines that load adapters by name.

    Raises:
      ConfigError: names the keys.
    """
    engine = config.engine
    if is_inside:
        cause = f"engine.device={engine.device!r} runs the engine inside the trainer, which takes"
        cause += " whole weights as arrays. Set engine.device=cpu or share"
    elif engine.mirrors:
        cause = f"engine.mirrors={engine.mirrors!r} copy whole checkpoints. Clear it"
    elif "rollout" in config and config.rollout.lend_engines:
        cause = f"rollout.lend_engines={config.rollout.lend_engines} frees the weights that the"
        cause += " adapters belong to. Set it to 0"
    else:
        return
    raise ConfigError(f"lora.publish=adapter: {cause}, or lora.publish=merged.")


def check_inside(config: ml_collections.ConfigDict) -> None:
    """Refuse what contradicts an engine inside the trainer.

    Raises:
      ConfigError: names the keys.
    """
    engine = config.engine
    if engine.pause == "in_place" and not engine.keep_memory:
        raise ConfigError(
            "engine.pause=in_place freezes requests with their caches, and engine.keep_memory=False"
            " frees these for the updates, where the engine is inside the trainer. Set"
            " engine.keep_memory=True, or engine.pause=abort."
        )
    if "rollout" in config and config.rollout.lend_engines:
        raise ConfigError(
            f"rollout.lend_engines={config.rollout.lend_engines} lends devices of other processes,"
            " and the engine is inside the trainer, which has its device at every update. Set it to"
            " 0."
        )


def weights_directory(workdir: pathlib.Path) -> pathlib.Path:
    """Return the directory of a run's published weights."""
    return workdir / "weights"
