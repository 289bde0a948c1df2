"""One run of one experiment in one workdir: wires the learner to engines, sandboxes and files, and
leaves the outcome for programs.

WORKDIR/report.json, metrics.jsonl, trajectories/, checkpoints/, evals/, final/ (a Hugging Face
directory), engine.log, init/ (the run that this one started from).

Of several processes only the leader has engines and sandboxes and writes; what it found out the
others learn by `team.share`, and the step's trajectories they read from the workdir.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import random
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from envs.rock.sync import loop
from envs.rock.sync import run as run_async
from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES, eval_seed, train_seed
from envs.tasks.terminal.env import BASH_TOOL, TerminalEnv
from rome.agent.loop import Limits
from rome.data.batch import Batch
from rome.data.packing import microbatches
from rome.data.seeds import derive_seed
from rome.data.sources import sft_batches
from rome.data.text import Corpus, read_corpus, text_batches, text_rows
from rome.data.trajectory import Trajectory
from rome.engine.client import Engine
from rome.engine.mirror import MirrorClient
from rome.engine.pool import EnginePool
from rome.engine.process import ServerProcess, start_server
from rome.engine.publish import publish_weights, write_checkpoint
from rome.engine.supervise import supervise
from rome.losses import LIKELIHOODS, LOSSES, count_denominators
from rome.model.config import PRESETS, ModelConfig
from rome.model.hf.checkpoint import load_hf, read_config, save_hf
from rome.model.ops.kernels import Kernels
from rome.model.params import param_shardings
from rome.model.sharding import make_mesh
from rome.model.tokenizer import Chat, Tokenizer
from rome.rollout.demonstrations import collect_demonstrations
from rome.rollout.player import Accounting, Episode, EpisodePlayer
from rome.stages.collect import EXPERT_CONCURRENCY, Collector, load_when_visible, own_settings
from rome.stages.config import loss_config, sandbox_config
from rome.train.alarms import check_figures
from rome.train.checkpoint import Checkpoints
from rome.train.display import Display
from rome.train.distributed import check_mesh_spans
from rome.train.loop import Stage, StepData, run_stage
from rome.train.metrics import MetricsWriter
from rome.train.parameters import StoredParameters, saved_steps
from rome.train.report import (
    Evaluation,
    evaluation_of,
    outcomes_path,
    read_outcomes,
    write_outcomes,
    write_report,
)
from rome.train.state import TrainState, make_optimizer
from rome.train.step import Learner
from rome.train.team import Team

PROBE = (  # any text does: the engine's logprobs of it must be the trainer's
    "Read the note and do what it says."
)
PUBLISH_SECONDS = 900.0
PROBE_TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.3,
}  # the largest difference of one token's logprob; other weights differ by more


@dataclasses.dataclass
class Run:
    """What a run holds. Made by `start_run`, used by `train`, closed by `close`."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    model_config: ModelConfig
    chat: Chat
    learner: Learner
    team: Team
    isolation: str
    display: Display
    earlier_evals: list[Evaluation]
    corpus: Corpus | None = None  # of a stage that learns from plain text
    started: float = dataclasses.field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    evals: list[Evaluation] = dataclasses.field(default_factory=list)
    published: int | None = None
    complete: bool = False
    pool: EnginePool | None = None
    servers: list[ServerProcess] = dataclasses.field(default_factory=list)
    supervisor: concurrent.futures.Future | None = None
    publication: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # what the last one took
    checkpoints: Checkpoints | None = None
    stream: Any = None  # of batches with a position, where nothing is sampled

    @functools.cached_property
    def collector(self) -> Collector:
        return Collector(self)

    @property
    def plays(self) -> bool:
        """Whether this stage learns from episodes of its own."""
        return self.config.loss not in LIKELIHOODS

    @property
    def weights(self) -> pathlib.Path:
        """Where engines find what was published."""
        return self.workdir / "weights"

    # -- engines
    # ---------------------------------------------------------------------------------------------

    def start_engines(self, state: TrainState) -> None:
        """The servers of the config, or embedded ones of our own that start with these weights.

        Plain text needs none.
        """
        config = self.config
        if config.loss == "cpt":
            return
        urls = [url.strip() for url in config.engines.split(",") if url.strip()]
        if not urls:
            start = self.weights / "start"
            save_hf(state.params, self.model_config, start)
        if not self.team.leads:
            return
        if not urls:
            self.display.note(
                f"starting {config.embedded_engines} embedded engines"
                if config.embedded_engines > 1
                else "starting the embedded engine"
            )
            for number in range(config.embedded_engines):
                log = self.workdir / ("engine.log" if number == 0 else f"engine_{number}.log")
                self.servers.append(
                    start_server(
                        start,
                        log,
                        flags=[
                            "--skip_tokenizer_init",
                            f"--slots={config.engine_slots}",
                            f"--max_context={config.max_context}",
                            f"--dtype={self.model_config.dtype}",
                        ],
                    )
                )
            urls = [server.url for server in self.servers]
        mirrors = [url.strip() for url in config.mirrors.split(",") if url.strip()]
        engines = [
            Engine(url, model=self.model_config, mirror=MirrorClient(mirror) if mirror else None)
            for url, mirror in itertools.zip_longest(urls, mirrors)
        ]
        self.pool = EnginePool(
            engines, restart={server.url: server.restart for server in self.servers}
        )
        self.supervisor = asyncio.run_coroutine_threadsafe(supervise(self.pool), loop())

    def publish(self, state: TrainState) -> None:
        """Brings the weights of `state` to every engine and proves that they are there.

        Nothing to do if they are.
        """
        version = int(state.step)
        if version == self.published:
            return
        if self.plays:
            # that step is trained, whatever becomes of its publication
            self.collector.before = None
        ids = self.chat.open(PROBE)
        expected = self.learner.score_one(state.params, ids)
        path = write_checkpoint(
            state.params,
            self.model_config,
            self.weights,
            version,
            self._needed(version),
            delta=bool(self.config.mirrors),
        )

        def publish() -> dict[str, float]:
            run_async(self.pool.take_back(), PUBLISH_SECONDS)
            done = run_async(
                publish_weights(
                    path,
                    version,
                    self.pool,
                    probe_ids=ids,
                    expected_logprobs=expected,
                    tolerance=PROBE_TOLERANCE[self.model_config.dtype],
                ),
                PUBLISH_SECONDS,
            )
            return {
                "engines": done.engines,
                "seconds_paused": done.seconds_pause,
                "probe_error": done.probe_error,
            } | (
                {"seconds_transfer": done.seconds_transfer, "bytes_transfer": done.bytes_transfer}
                if self.config.mirrors
                else {}
            )

        self.publication = self.team.share(f"weights {version}", publish)
        self.published = version
        if self.plays:
            self.collector.advance(state)

    def lend(self) -> None:
        """The learner takes the devices of some engines for its update; `publish` gives them back."""
        if self.team.leads:
            run_async(self.pool.lend(self.config.lend_engines), PUBLISH_SECONDS)

    def _needed(self, version: int) -> set[int]:
        """Versions whose samples a run that resumes from a checkpoint may have to score again."""
        if not self.plays or not self.config.async_ratio:
            return set()
        return {
            step - age
            for step in (version, *self.checkpoints.steps())
            for age in range(self.config.async_ratio + 1)
        }

    def make_env(self, task: str) -> TerminalEnv:
        return TerminalEnv(
            task,
            sandbox_config(self.config),
            max_turns=self.config.max_turns,
            command_timeout=self.config.sandbox.command_timeout,
        )

    @functools.cached_property
    def scheduler(self) -> EpisodePlayer:
        limits = Limits(
            self.config.max_context, self.config.max_new_tokens, self.config.episode_seconds
        )
        return EpisodePlayer(
            self.pool,
            self.make_env,
            self.chat,
            limits,
            self.config.concurrency,
            self.team.wants_to_stop,
        )

    def play(self, episodes: list[Episode], temperature: float, **options: Any) -> list[Trajectory]:
        """Plays episodes on the background loop; the deadline is what they may take at worst, one
        wave after the other.
        """
        waves = -(-len(episodes) // self.config.concurrency)
        return run_async(
            self.scheduler.play(episodes, temperature=temperature, **options),
            60.0 + waves * self.scheduler.attempts * self.config.episode_seconds,
        )

    # -- what the loop asks for
    # ---------------------------------------------------------------------------------------------

    def collect_batches(self, step: int, state: TrainState) -> StepData:
        if self.stream is None:
            self.stream = self._open_stream()
        batch = next(self.stream)
        self.require_same_rows(step, batch)
        batches = microbatches(batch, self.config.rows_per_microbatch)
        tokens = sum(int((batch.segments_BT > 0).sum()) for batch in batches)
        return StepData(batches, count_denominators(batches), {"tokens": tokens})

    def require_same_rows(self, step: int, batch: Batch) -> None:
        """Each process packs for itself and feeds only its own rows: that they are parts of one
        batch is checked, not assumed.
        """
        if self.team.count > 1:
            digest = hashlib.sha256()
            batch.map(lambda field: digest.update(np.ascontiguousarray(field).tobytes()))
            self.team.require_same(f"rows of step {step}", digest.hexdigest())

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        """Held-out tasks, the same ones at every evaluation and with the same sampling seeds.

        Kept: a resumed run reads it again.
        """
        stage = self.config.experiment
        path = outcomes_path(self.workdir, stage, step)
        if not self.team.share(f"evaluated at {step}", path.exists):
            if self.config.loss == "cpt":
                found = self._score_held_out_text(state)
                self.team.share(
                    f"evaluation at {step}",
                    lambda: write_outcomes(self.workdir, stage, step, found),
                )
            else:
                self.publish(state)
                self.team.share(f"evaluation at {step}", lambda: self._play_evaluation(step))
        result = evaluation_of(
            stage,
            step,
            self.team.share(
                f"outcomes at {step}", lambda: read_outcomes(self.workdir, stage, step)
            ),
        )
        self.evals = [kept for kept in self.evals if kept.step != step] + [result]
        self.write_report(step)
        return result

    def enough(self, result: Evaluation) -> bool:
        """Whether SFT has come as far as it is to come."""
        return self.config.loss == "sft" and 0 < self.config.until_success <= result.success

    def _score_held_out_text(self, state: TrainState) -> dict[str, float]:
        """Bits that the model takes for a byte of held-out documents, the same ones at every
        evaluation.
        """
        config, documents = self.config, self.corpus.held_out
        texts = [documents[index] for index in range(min(config.eval_documents, len(documents)))]
        batches = microbatches(
            text_rows(
                texts,
                self.chat.tokenizer,
                row_length=config.row_length,
                chunks_per_row=config.chunks_per_row,
            ),
            config.rows_per_microbatch,
        )
        nats = -sum(
            float(np.sum(logp_BT, where=batch.action_mask_BT, dtype=np.float64))
            for batch, logp_BT in zip(batches, self.learner.score(state.params, batches))
        )
        size = sum(len(text.encode()) for text in texts)
        return {"bits_per_byte": nats / math.log(2) / size, "bytes": size}

    def _play_evaluation(self, step: int) -> None:
        config = self.config
        tasks = [
            (family, f"{family}/{eval_seed(index)}")
            for family in (*FAMILIES, *HELD_OUT_FAMILIES)
            for index in range(config.eval_tasks)
        ]
        # Another seed gives other tasks: results of several runs can be pooled.
        episodes = [
            Episode(
                _shifted(task, config.seed * 10_000), 0, 0, derive_seed(config.seed, "eval", task)
            )
            for _, task in tasks
        ]
        trajectories = self.play(episodes, config.eval_temperature)
        write_outcomes(
            self.workdir,
            config.experiment,
            step,
            {
                "tasks": [
                    {
                        "task": trajectory.task,
                        "family": trajectory.family,
                        "success": int(trajectory.reward == 1.0),
                        "unseen_family": trajectory.family in HELD_OUT_FAMILIES,
                    }
                    for trajectory in trajectories
                ]
            },
        )

    def host_state(self) -> dict[str, Any]:
        stream = None if self.stream is None else self.stream.get_state()
        text = None if self.corpus is None else self.corpus.digest
        rollouts = self.collector.get_state() if self.plays else None
        return {"seconds": self.seconds(), "stream": stream, "text": text, "rollouts": rollouts}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        if self.corpus is not None and self.corpus.digest != host.get(
            "text"
        ):  # a position in another text would mean nothing
            raise ValueError(
                f"the text under {self.config.text or 'the standard library'} is not what the"
                f" checkpoint of step {step} was trained on. Bring it back, or give another"
                " --workdir."
            )
        self.seconds_before = host["seconds"]
        if self.plays:
            self.collector.set_state(host["rollouts"])
        stage = self.config.experiment
        done = sorted(
            int(path.stem.rpartition("_")[2])
            for path in outcomes_path(self.workdir, stage, 0).parent.glob(f"{stage}_*.json")
        )
        self.evals = [
            evaluation_of(stage, number, read_outcomes(self.workdir, stage, number))
            for number in done
            if number <= step
        ]
        if host["stream"] is not None:
            self.stream = self._open_stream()
            self.stream.set_state(host["stream"])

    # -- the end
    # ---------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def write_report(self, step: int) -> None:
        if not self.team.leads:
            return
        accounting = self.collector.accounting if self.plays else Accounting()
        accounting.check()
        write_report(
            self.workdir,
            {
                "experiment": self.config.experiment,
                "preset": self.config.preset,
                "loss": self.config.loss,
                "seed": self.config.seed,
                "steps": step,
                "wall_seconds": round(self.seconds(), 1),
                "isolation": self.isolation,
                "evals": [*self.earlier_evals, *self.evals],
                "accounting": accounting.to_json(),
            },
        )

    def export(self, state: TrainState) -> None:
        """WORKDIR/final: the trained weights for launch.serve and for the experiment that starts
        here.

        There, or not at all.
        """
        partial, final = self.workdir / "final.tmp", self.workdir / "final"
        save_hf(state.params, self.model_config, partial)

        def finish() -> None:
            self.chat.tokenizer.save(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

        self.team.share("final", finish)

    def close(self) -> None:
        with (
            contextlib.ExitStack() as ends
        ):  # each of them, whatever the others raise; the last first
            for server in self.servers:
                ends.callback(server.stop)
            if self.pool is not None:
                ends.callback(lambda: run_async(self.pool.close(), 30.0))
            if self.supervisor is not None:
                ends.callback(self.supervisor.cancel)
            if self.plays:
                ends.callback(self.collector.close)

    def _open_stream(self):
        """Documents, or expert trajectories, played where they are not on disk yet, as an endless
        stream of batches.
        """
        config = self.config
        shape = {
            "rows": config.rows,
            "row_length": config.row_length,
            "chunks_per_row": config.chunks_per_row,
            "seed": config.seed,
        }
        if config.loss == "cpt":
            return iter(text_batches(self.corpus.training, self.chat.tokenizer, **shape))
        rng = random.Random(f"experts/{config.seed}")
        tasks = [
            f"{FAMILIES[number % len(FAMILIES)]}/{train_seed(rng.randrange(1_000_000))}"
            for number in range(config.expert_episodes)
        ]
        path = lambda number: self.workdir / "trajectories" / f"expert_{number:06d}.json"

        def play() -> None:
            self.display.note(
                f"experts play {len(tasks)} tasks of {len(FAMILIES)} families in the sandbox"
            )
            trajectories.extend(
                run_async(
                    collect_demonstrations(
                        tasks,
                        self.make_env,
                        self.chat,
                        error_rate=config.expert_error_rate,
                        concurrency=EXPERT_CONCURRENCY,
                        record=path,
                    ),
                    60.0 + -(-len(tasks) // EXPERT_CONCURRENCY) * config.episode_seconds,
                )
            )

        trajectories: list[Trajectory] = []
        self.team.share("experts", play)
        trajectories = trajectories or [
            load_when_visible(path(number)) for number in range(len(tasks))
        ]
        return iter(sft_batches(trajectories, **shape))


def start_run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    isolation: str,
    team: Team,
    display: Display,
    earlier_evals: list[Evaluation],
) -> Run:
    """Builds the learner of this config; raises what is wrong with it before anything is started."""
    tokenizer = Tokenizer.load(config.tokenizer)
    model_config = model_of(config)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, model {config.model}"
            f" a vocabulary of {model_config.vocab_size}. Choose ones that fit."
        )
    model_config = dataclasses.replace(
        model_config, eos_token_id=tokenizer.im_end, pad_token_id=tokenizer.pad
    )
    corpus = open_corpus(config, display) if config.loss == "cpt" else None
    learner = make_learner(config, model_config)
    # The tiny model learns the form of a tool call from the experts; a real one is told the tools
    # as in its own chat template.
    chat = Chat(tokenizer, tools=None if config.model == "tiny" else [BASH_TOOL])
    (workdir / "trajectories").mkdir(parents=True, exist_ok=True)
    return Run(
        config,
        workdir,
        model_config,
        chat,
        learner,
        team,
        isolation,
        display,
        earlier_evals,
        corpus,
    )


def open_corpus(config: ml_collections.ConfigDict, display: Display) -> Corpus:
    corpus = read_corpus(config.text, config.held_out_share)
    skipped = (
        f"; {len(corpus.skipped)} skipped, empty or not UTF-8 text"
        f" ({corpus.skipped[0]}{', ...' if len(corpus.skipped) > 1 else ''})"
        if corpus.skipped
        else ""
    )
    display.note(
        f"text: {len(corpus.training)} documents to train on, {len(corpus.held_out)} held"
        f" out{skipped}"
    )
    return corpus


def model_of(config: ml_collections.ConfigDict) -> ModelConfig:
    """The preset, as the config's learner wants it trained."""
    learner = config.learner
    return dataclasses.replace(
        PRESETS[config.model],
        remat=learner.remat,
        capacity_factor=learner.capacity_factor,
        router_z_loss_coef=learner.router_z_loss_coef,
    )


def make_learner(
    config: ml_collections.ConfigDict,
    model_config: ModelConfig,
    devices: Sequence[Any] | None = None,
) -> Learner:
    """The learner of a config, on all devices of this machine or on the given ones."""
    optimizer = make_optimizer(
        learning_rate=config.learning_rate,
        warmup_updates=config.warmup_updates,
        decay_updates=config.decay and config.steps * config.updates_per_step,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    # A likelihood is maximised as it is; a policy's logprobs are those of its sampling temperature.
    temperature = 1.0 if config.loss in LIKELIHOODS else config.temperature
    mesh = make_mesh(config.mesh.to_dict(), model_config, devices)
    if devices is None:
        check_mesh_spans(mesh)
    kernels = Kernels(config.learner.attention, config.learner.experts, config.learner.exchange)
    return Learner(
        model_config,
        LOSSES[config.loss],
        loss_config(config),
        optimizer,
        mesh,
        temperature,
        kernels,
        config.learner.offload_moments,
    )


def train(run: Run, init_directory: pathlib.Path | None) -> TrainState:
    """Starts or resumes the run and trains to its end, or to the step at which the user asked to
    stop.
    """
    config, learner = run.config, run.learner
    checkpoints = run.checkpoints = Checkpoints(
        run.workdir / "checkpoints", config.checkpoints_kept
    )
    step = run.team.share("checkpoint", checkpoints.latest)
    if step is None:
        state = (
            learner.init(config.seed)
            if init_directory is None
            else learner.start(load_start(init_directory, run.model_config, learner.mesh))
        )
    else:
        state, host = checkpoints.restore(learner.state, step)
        run.load_host_state(step, host)
        run.display.note(f"resumed at step {step}")
    run.team.meet(
        "state"
    )  # some had to compile what made it, others found it compiled; gloo gives them 30 s to reach a collective together
    stage = Stage(
        name=config.experiment,
        steps=config.steps,
        updates_per_step=config.updates_per_step,
        evaluate_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        collect=run.collector.collect if run.plays else run.collect_batches,
        publish=run.publish if run.plays else lambda state: None,
        evaluate=run.evaluate,
        enough=run.enough,
        host_state=run.host_state,
        should_stop=run.team.should_stop,
        check=lambda step, figures: (
            check_figures(step, figures, config.alarm_kl) if run.plays else None
        ),
        team=run.team,
        before_update=run.lend if run.plays and config.lend_engines else lambda: None,
    )
    try:
        run.start_engines(state)
        run.team.meet("engines")  # the leader alone has waited for them
        with MetricsWriter(
            run.workdir, stage.name, resume_step=-1 if step is None else step, writes=run.team.leads
        ) as metrics:
            state = run_stage(stage, learner, state, checkpoints, metrics, run.display)
        run.write_report(int(state.step))
        run.complete = int(state.step) == stage.steps
        if run.complete:
            run.export(state)  # last: a workdir with final/ is complete
    except BaseException as error:
        run.team.part(error)
        raise
    finally:
        checkpoints.close()
        run.close()
    return state


def load_start(directory: pathlib.Path, model_config: ModelConfig, mesh: Mesh) -> dict:
    """float32 parameters of a Hugging Face directory, or of what launch.convert made of one,
    straight to their places on the mesh.
    """
    ours = own_settings(model_config)
    loaded, shardings = read_config(directory, **ours), param_shardings(mesh, model_config)
    if loaded != model_config:
        raise ValueError(
            f"{directory} holds another model than --config.model asks for: {loaded}, not"
            f" {model_config}"
        )
    if (directory / "checkpoints").is_dir():
        return StoredParameters(
            directory / "checkpoints", saved_steps(directory / "checkpoints")[-1], model_config
        ).restore(shardings, jnp.float32)
    return load_hf(directory, shardings=shardings, **ours)[0]


def _shifted(task: str, offset: int) -> str:
    family, seed = task.split("/")
    return f"{family}/{int(seed) + offset}"
