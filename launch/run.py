"""One run of one experiment in one workdir: wires the learner to engines, sandboxes and files, and leaves the outcome for programs.

WORKDIR/report.json, metrics.jsonl, trajectories/, checkpoints/, evals/, final/ (a Hugging Face directory), engine.log, init/ (the run that
this one started from).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from envs.rock import SandboxConfig
from envs.rock.sync import run as run_async
from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES, eval_seed, train_seed
from envs.tasks.terminal.env import BASH_TOOL, TerminalEnv
from rome.agent.loop import Limits, derive_seed
from rome.data.batch import Batch
from rome.data.packing import microbatches, pack
from rome.data.sources import sft_batches
from rome.data.trajectory import Trajectory
from rome.engine.client import Engine
from rome.engine.pool import EnginePool
from rome.engine.process import start_server
from rome.engine.publish import publish_weights
from rome.losses import LOSSES, LossConfig, count_denominators
from rome.model.config import PRESETS, ModelConfig
from rome.model.hf import load_hf, read_config, save_hf
from rome.model.sharding import make_mesh, param_shardings
from rome.model.tokenizer import Chat, Tokenizer
from rome.rollout.curriculum import Curriculum
from rome.rollout.experts import collect_experts
from rome.rollout.outcomes import mixed_groups, rollout_figures, unsolved_tasks
from rome.rollout.scheduler import Accounting, Episode, Scheduler
from rome.train.checkpoint import Checkpoints
from rome.train.display import Display
from rome.train.loop import Stage, StepData, run_stage
from rome.train.metrics import MetricsWriter
from rome.train.parameters import StoredParameters, saved_steps
from rome.train.report import EvalResult, outcomes_path, read_outcomes, write_outcomes, write_report
from rome.train.state import TrainState, init_state, make_optimizer, start_state
from rome.train.step import Learner

PROBE = "Read the note and do what it says."  # any text does: the engine's logprobs of it must be the trainer's
PUBLISH_SECONDS = 900.0
EXPERT_CONCURRENCY = 16
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}  # the largest difference of one token's logprob; other weights differ by more


@dataclasses.dataclass
class Run:
    """What a run holds. Made by `start_run`, used by `train`, closed by `close`."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    model_config: ModelConfig
    chat: Chat
    learner: Learner
    should_stop: Callable[[], bool]
    isolation: str
    display: Display
    earlier_evals: list[EvalResult]
    started: float = dataclasses.field(default_factory=time.monotonic)
    seconds_before: float = 0.0
    accounting: Accounting = dataclasses.field(default_factory=Accounting)
    curriculum: Curriculum = dataclasses.field(default_factory=lambda: Curriculum(FAMILIES))
    evals: list[EvalResult] = dataclasses.field(default_factory=list)
    published: int | None = None
    pool: EnginePool | None = None
    server: Any = None
    sft_stream: Any = None

    # -- engines -------------------------------------------------------------------------------------------------------------------

    def start_engines(self, state: TrainState) -> None:
        """The servers of the config, or an embedded one of our own that starts with these weights."""
        urls = [url.strip() for url in self.config.engines.split(",") if url.strip()]
        if not urls:
            start = self.workdir / "weights" / "start"
            shutil.rmtree(start, ignore_errors=True)
            start.mkdir(parents=True)
            save_hf(state.params, self.model_config, start)
            self.display.note("starting the embedded engine")
            self.server = start_server(start, self.workdir / "engine.log", flags=[
                "--skip_tokenizer_init", f"--slots={self.config.engine_slots}", f"--max_context={self.config.max_context}",
                f"--dtype={self.model_config.dtype}",
            ])
            urls = [self.server.url]
        self.pool = EnginePool([Engine(url, model=self.model_config) for url in urls])

    def publish(self, state: TrainState) -> None:
        """Brings the weights of `state` to every engine and proves that they are there. Nothing to do if they are."""
        version = int(state.step)
        if version == self.published:
            return
        ids = self.chat.open(PROBE)
        expected = self.learner.score_one(state.params, ids)
        run_async(publish_weights(
            state.params, self.model_config, self.workdir / "weights", version, self.pool, probe_ids=ids,
            expected_logprobs=expected, tolerance=PROBE_TOLERANCE[self.model_config.dtype],
        ), PUBLISH_SECONDS)
        self.published = version

    def make_env(self, task: str) -> TerminalEnv:
        sandbox = self.config.sandbox
        return TerminalEnv(
            task, SandboxConfig(isolation=sandbox.isolation, memory_mb=sandbox.memory_mb, pids=sandbox.pids, disk_mb=sandbox.disk_mb),
            max_turns=self.config.max_turns, command_timeout=sandbox.command_timeout,
        )

    @functools.cached_property
    def scheduler(self) -> Scheduler:
        limits = Limits(self.config.max_context, self.config.max_new_tokens, self.config.episode_seconds)
        return Scheduler(self.pool, self.make_env, self.chat, limits, self.config.concurrency, self.should_stop)

    def play(self, episodes: list[Episode], temperature: float, **options: Any) -> list[Trajectory]:
        """Plays episodes on the background loop; the deadline is what they may take at worst, one wave after the other."""
        waves = -(-len(episodes) // self.config.concurrency)
        return run_async(self.scheduler.play(episodes, temperature=temperature, **options), 60.0 + waves * self.scheduler.attempts * self.config.episode_seconds)

    # -- what the loop asks for ----------------------------------------------------------------------------------------------------

    def collect_sft(self, step: int, state: TrainState) -> StepData:
        if self.sft_stream is None:
            self.sft_stream = self._open_sft_stream()
        batches = microbatches(next(self.sft_stream), self.config.rows_per_microbatch)
        tokens = sum(int((batch.segments_BT > 0).sum()) for batch in batches)
        return StepData(batches, count_denominators(batches), {"tokens": tokens})

    def collect_rollouts(self, step: int, state: TrainState) -> StepData:
        """groups x group_size fresh episodes at the weights of `state`, packed, with logp_old scored at those weights."""
        config, began = self.config, time.monotonic()
        rng = random.Random(f"tasks/{config.seed}/{step}")
        tasks = [f"{family}/{train_seed(rng.randrange(1_000_000))}" for family in self.curriculum.draw(config.groups, rng)]
        episodes = [
            Episode(task, group, number, derive_seed(config.seed, task, step, group, number))
            for group, task in enumerate(tasks) for number in range(config.group_size)
        ]
        record = lambda episode: self.workdir / "trajectories" / f"{config.experiment}_{step:06d}_g{episode.group:03d}_e{episode.episode:02d}.json"
        replays = config.routing_replay == "rollout"
        trajectories = self.play(episodes, config.temperature, accounting=self.accounting, record=record, routes=replays)
        seconds = time.monotonic() - began
        self.curriculum.observe(trajectories)
        kept = mixed_groups(trajectories) if config.filter_groups else trajectories
        shown = self.show_experts(step, unsolved_tasks(trajectories)) if config.lambda_il else []
        batch = pack(
            kept + shown, row_length=config.row_length, chunks_per_row=config.chunks_per_row, gamma=config.gamma, failure_reward=config.failure_reward,
            routes_for=self.model_config if replays else None,
        )
        batches = self._with_old(microbatches(batch, config.rows_per_microbatch), state)
        self.accounting.in_flight -= len(trajectories)
        self.accounting.trained += len(kept)
        self.accounting.dropped["equal_group"] += len(trajectories) - len(kept)
        self.accounting.check()
        return StepData(batches, count_denominators(batches), rollout_figures(trajectories, step, seconds) | {"demonstrations": len(shown)})

    def show_experts(self, step: int, tasks: list[str]) -> list[Trajectory]:
        """Eq. 10's imitation: what an expert does in the tasks that no episode of the step solved. Each is a group of its own, outside all statistics."""
        record = lambda number: self.workdir / "trajectories" / f"{self.config.experiment}_{step:06d}_expert_{number:03d}.json"
        shown = run_async(collect_experts(
            tasks, self.make_env, self.chat, error_rate=0.0, concurrency=EXPERT_CONCURRENCY, record=record,
        ), 60.0 + len(tasks) * self.config.episode_seconds / EXPERT_CONCURRENCY)
        return [dataclasses.replace(trajectory, group=self.config.groups + number) for number, trajectory in enumerate(shown)]

    def _with_old(self, batches: list[Batch], state: TrainState) -> list[Batch]:
        """logp_old of every micro-batch and, where the trainer is to replay its own routes, the routes of the pass that scored them."""
        if self.config.old == "rollout":
            return [batch._replace(logp_old_BT=batch.logp_rollout_BT) for batch in batches]
        if self.config.routing_replay == "recompute":
            scored = self.learner.score_and_record(state.params, batches)
        else:
            scored = [(logp_BT, batch.routes_BTLk) for batch, logp_BT in zip(batches, self.learner.score(state.params, batches))]
        return [
            batch._replace(logp_old_BT=np.where(batch.action_mask_BT, logp_BT, 0.0), routes_BTLk=routes_BTLk)
            for batch, (logp_BT, routes_BTLk) in zip(batches, scored)
        ]

    def evaluate(self, step: int, state: TrainState) -> EvalResult:
        """Held-out tasks, the same ones at every evaluation and with the same sampling seeds. Kept: a resumed run reads it again."""
        config, stage = self.config, self.config.experiment
        if not outcomes_path(self.workdir, stage, step).exists():
            self.publish(state)
            tasks = [(family, f"{family}/{eval_seed(index)}") for family in (*FAMILIES, *HELD_OUT_FAMILIES) for index in range(config.eval_tasks)]
            # Another seed gives other tasks: results of several runs can be pooled.
            episodes = [Episode(_shifted(task, config.seed * 10_000), 0, 0, derive_seed(config.seed, "eval", task)) for _, task in tasks]
            trajectories = self.play(episodes, config.eval_temperature)
            write_outcomes(self.workdir, stage, step, [
                {"task": trajectory.task, "family": trajectory.family, "success": int(trajectory.reward == 1.0), "unseen_family": trajectory.family in HELD_OUT_FAMILIES}
                for trajectory in trajectories
            ])
        result = EvalResult.from_tasks(stage, step, read_outcomes(self.workdir, stage, step))
        self.evals = [kept for kept in self.evals if kept.step != step] + [result]
        self.write_report(step)
        return result

    def host_state(self) -> dict[str, Any]:
        stream = None if self.sft_stream is None else self.sft_stream.get_state()
        return {"accounting": self.accounting.to_json(), "seconds": self.seconds(), "sft_stream": stream, "success_rates": self.curriculum.rates}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        self.accounting = Accounting.from_json(host["accounting"])
        self.seconds_before = host["seconds"]
        self.curriculum = Curriculum(FAMILIES, host["success_rates"])
        stage = self.config.experiment
        done = sorted(int(path.stem.rpartition("_")[2]) for path in outcomes_path(self.workdir, stage, 0).parent.glob(f"{stage}_*.json"))
        self.evals = [EvalResult.from_tasks(stage, number, read_outcomes(self.workdir, stage, number)) for number in done if number <= step]
        if host["sft_stream"] is not None:
            self.sft_stream = self._open_sft_stream()
            self.sft_stream.set_state(host["sft_stream"])

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def write_report(self, step: int) -> None:
        self.accounting.check()
        write_report(self.workdir, {
            "experiment": self.config.experiment, "preset": self.config.preset, "loss": self.config.loss, "seed": self.config.seed, "steps": step,
            "wall_seconds": round(self.seconds(), 1), "isolation": self.isolation, "evals": [*self.earlier_evals, *self.evals],
            "accounting": self.accounting.to_json(),
        })

    def export(self, state: TrainState) -> None:
        """WORKDIR/final: the trained weights for launch.serve and for the experiment that starts here. There, or not at all."""
        partial, final = self.workdir / "final.tmp", self.workdir / "final"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_hf(state.params, self.model_config, partial)
        self.chat.tokenizer.save(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def close(self) -> None:
        if self.pool is not None:
            run_async(self.pool.close(), 30.0)
        if self.server is not None:
            self.server.stop()

    def _open_sft_stream(self):
        """Expert trajectories, played where they are not on disk yet, as an endless stream of batches."""
        config = self.config
        rng = random.Random(f"experts/{config.seed}")
        tasks = [f"{FAMILIES[number % len(FAMILIES)]}/{train_seed(rng.randrange(1_000_000))}" for number in range(config.expert_episodes)]
        self.display.note(f"experts play {len(tasks)} tasks of {len(FAMILIES)} families in the sandbox")
        directory = self.workdir / "trajectories"
        trajectories = run_async(collect_experts(
            tasks, self.make_env, self.chat, error_rate=config.expert_error_rate, concurrency=EXPERT_CONCURRENCY,
            record=lambda number: directory / f"expert_{number:06d}.json",
        ), 60.0 + len(tasks) * config.episode_seconds / EXPERT_CONCURRENCY)
        return iter(sft_batches(trajectories, rows=config.rows, row_length=config.row_length, chunks_per_row=config.chunks_per_row, seed=config.seed))


def start_run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, *, isolation: str, should_stop: Callable[[], bool], display: Display,
    earlier_evals: list[EvalResult],
) -> Run:
    """Builds the learner of this config; raises what is wrong with it before anything is started."""
    tokenizer = Tokenizer.load(config.tokenizer)
    model_config = PRESETS[config.model]
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, model {config.model} a vocabulary of {model_config.vocab_size}. Choose ones that fit.")
    model_config = dataclasses.replace(model_config, eos_token_id=tokenizer.im_end, pad_token_id=tokenizer.pad)
    learner = make_learner(config, model_config)
    # The tiny model learns the form of a tool call from the experts; a real one is told the tools as in its own chat template.
    chat = Chat(tokenizer, tools=None if config.model == "tiny" else [BASH_TOOL])
    (workdir / "trajectories").mkdir(parents=True, exist_ok=True)
    return Run(config, workdir, model_config, chat, learner, should_stop, isolation, display, earlier_evals)


def make_learner(config: ml_collections.ConfigDict, model_config: ModelConfig, devices: Sequence[Any] | None = None) -> Learner:
    """The learner of a config, on all devices of this machine or on the given ones."""
    optimizer = make_optimizer(
        learning_rate=config.learning_rate, warmup_updates=config.warmup_updates, decay_updates=config.decay and config.steps * config.updates_per_step,
        weight_decay=config.weight_decay, clip=config.clip,
    )
    loss_config = LossConfig() if config.loss == "sft" else LossConfig(
        norm=config.norm, mismatch_mask=config.mismatch_mask, mismatch_limit=config.mismatch_threshold, lambda_rl=config.lambda_rl,
        lambda_il=config.lambda_il, clip_low=config.clip_low, clip_high=config.clip_high,
    )
    # SFT maximises the likelihood itself; a policy's logprobs are those of its sampling temperature.
    temperature = 1.0 if config.loss == "sft" else config.temperature
    mesh = make_mesh(config.mesh.to_dict(), model_config, devices)
    return Learner(model_config, LOSSES[config.loss], loss_config, optimizer, mesh, temperature)


def train(run: Run, init_directory: pathlib.Path | None) -> TrainState:
    """Starts or resumes the run and trains to its end, or to the step at which the user asked to stop."""
    config, learner = run.config, run.learner
    checkpoints = Checkpoints(run.workdir / "checkpoints", config.checkpoints_kept)
    if init_directory is None:
        state = init_state(run.model_config, learner.optimizer, config.seed)
    else:
        state = start_state(load_start(init_directory, run.model_config, learner.mesh), learner.optimizer)
    state = learner.place(state)
    step = checkpoints.latest()
    if step is not None:
        state, host = checkpoints.restore(state)
        run.load_host_state(step, host)
        run.display.note(f"resumed at step {step}")
    stage = Stage(
        name=config.experiment, steps=config.steps, updates_per_step=config.updates_per_step, evaluate_every=config.eval_every,
        checkpoint_every=config.checkpoint_every, collect=run.collect_sft if config.loss == "sft" else run.collect_rollouts,
        publish=(lambda state: None) if config.loss == "sft" else run.publish, evaluate=run.evaluate, host_state=run.host_state, should_stop=run.should_stop,
    )
    try:
        run.start_engines(state)
        with MetricsWriter(run.workdir, stage.name, resume_step=-1 if step is None else step) as metrics:
            state = run_stage(stage, learner, state, checkpoints, metrics, run.display)
        run.write_report(int(state.step))
        if int(state.step) == config.steps:
            run.export(state)  # last: a workdir with final/ is complete
    finally:
        checkpoints.close()
        run.close()
    return state


def load_start(directory: pathlib.Path, model_config: ModelConfig, mesh: Mesh) -> dict:
    """float32 parameters of a Hugging Face directory, or of what launch.convert made of one, straight to their places on the mesh."""
    ours = {name: getattr(model_config, name) for name in ("dtype", "remat", "scan_layers")}  # not the checkpoint's affair
    loaded, shardings = read_config(directory, **ours), param_shardings(mesh, model_config)
    if loaded != model_config:
        raise ValueError(f"{directory} holds another model than --config.model asks for: {loaded}, not {model_config}")
    if (directory / "checkpoints").is_dir():
        return StoredParameters(directory / "checkpoints", saved_steps(directory / "checkpoints")[-1], model_config).restore(shardings, jnp.float32)
    return load_hf(directory, shardings=shardings, **ours)[0]


def _shifted(task: str, offset: int) -> str:
    family, seed = task.split("/")
    return f"{family}/{int(seed) + offset}"
