"""One run of one experiment in one workdir: wires the learner to engines, sandboxes and files, and leaves the outcome for programs.

WORKDIR/report.json, metrics.jsonl, trajectories/, checkpoints/, evals/, final/ (a Hugging Face directory), engine.log, init/ (the run that
this one started from).

Of several processes only the leader has engines and sandboxes and writes; what it found out the others learn by `team.share`, and the step's
trajectories they read from the workdir.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
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

from envs.rock.sync import run as run_async
from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES, eval_seed, train_seed
from envs.tasks.terminal.env import BASH_TOOL, TerminalEnv
from launch.config import loss_config, sandbox_config
from launch.distributed import check_mesh_spans
from rome.agent.loop import Limits, derive_seed
from rome.data.batch import Batch
from rome.data.packing import microbatches, pack
from rome.data.sources import sft_batches
from rome.data.text import Corpus, read_corpus, text_batches, text_rows
from rome.data.trajectory import Trajectory, load_trajectory
from rome.engine.client import Engine
from rome.engine.pool import EnginePool
from rome.engine.process import start_server
from rome.engine.publish import publish_weights, write_checkpoint
from rome.losses import ADVANTAGES, LIKELIHOODS, LOSSES, count_denominators
from rome.model.config import PRESETS, ModelConfig
from rome.model.hf import load_hf, read_config, save_hf
from rome.model.kernels import Kernels
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
from rome.train.report import Evaluation, evaluation_of, outcomes_path, read_outcomes, write_outcomes, write_report
from rome.train.state import TrainState, make_optimizer
from rome.train.step import Learner
from rome.train.team import Team

PROBE = "Read the note and do what it says."  # any text does: the engine's logprobs of it must be the trainer's
PUBLISH_SECONDS = 900.0
EXPERT_CONCURRENCY = 16
VISIBLE_SECONDS = 120.0  # in which a file that one host wrote is seen by the others (NFS and buckets keep old listings for a while)
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}  # the largest difference of one token's logprob; other weights differ by more


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
    accounting: Accounting = dataclasses.field(default_factory=Accounting)
    curriculum: Curriculum = dataclasses.field(default_factory=lambda: Curriculum(FAMILIES))
    evals: list[Evaluation] = dataclasses.field(default_factory=list)
    published: int | None = None
    pool: EnginePool | None = None
    server: Any = None
    stream: Any = None  # of batches with a position, where nothing is sampled

    # -- engines -------------------------------------------------------------------------------------------------------------------

    def start_engines(self, state: TrainState) -> None:
        """The servers of the config, or an embedded one of our own that starts with these weights. Plain text needs none."""
        if self.config.loss == "cpt":
            return
        urls = [url.strip() for url in self.config.engines.split(",") if url.strip()]
        if not urls:
            start = self.workdir / "weights" / "start"
            save_hf(state.params, self.model_config, start)
            if not self.team.leads:
                return
            self.display.note("starting the embedded engine")
            self.server = start_server(start, self.workdir / "engine.log", flags=[
                "--skip_tokenizer_init", f"--slots={self.config.engine_slots}", f"--max_context={self.config.max_context}",
                f"--dtype={self.model_config.dtype}",
            ])
            urls = [self.server.url]
        if self.team.leads:
            self.pool = EnginePool([Engine(url, model=self.model_config) for url in urls])

    def publish(self, state: TrainState) -> None:
        """Brings the weights of `state` to every engine and proves that they are there. Nothing to do if they are."""
        version = int(state.step)
        if version == self.published:
            return
        ids = self.chat.open(PROBE)
        expected = self.learner.score_one(state.params, ids)
        path = write_checkpoint(state.params, self.model_config, self.workdir / "weights", version)

        def publish() -> None:
            run_async(publish_weights(
                path, version, self.pool, probe_ids=ids, expected_logprobs=expected, tolerance=PROBE_TOLERANCE[self.model_config.dtype],
            ), PUBLISH_SECONDS)

        self.team.share(f"weights {version}", publish)
        self.published = version

    def make_env(self, task: str) -> TerminalEnv:
        return TerminalEnv(
            task, sandbox_config(self.config), max_turns=self.config.max_turns, command_timeout=self.config.sandbox.command_timeout,
        )

    @functools.cached_property
    def scheduler(self) -> Scheduler:
        limits = Limits(self.config.max_context, self.config.max_new_tokens, self.config.episode_seconds)
        return Scheduler(self.pool, self.make_env, self.chat, limits, self.config.concurrency, self.team.wants_to_stop)

    def play(self, episodes: list[Episode], temperature: float, **options: Any) -> list[Trajectory]:
        """Plays episodes on the background loop; the deadline is what they may take at worst, one wave after the other."""
        waves = -(-len(episodes) // self.config.concurrency)
        return run_async(self.scheduler.play(episodes, temperature=temperature, **options), 60.0 + waves * self.scheduler.attempts * self.config.episode_seconds)

    # -- what the loop asks for ----------------------------------------------------------------------------------------------------

    def collect_batches(self, step: int, state: TrainState) -> StepData:
        if self.stream is None:
            self.stream = self._open_stream()
        batch = next(self.stream)
        self._require_same_rows(step, batch)
        batches = microbatches(batch, self.config.rows_per_microbatch)
        tokens = sum(int((batch.segments_BT > 0).sum()) for batch in batches)
        return StepData(batches, count_denominators(batches), {"tokens": tokens})

    def collect_rollouts(self, step: int, state: TrainState) -> StepData:
        """groups x group_size fresh episodes at the weights of `state`, packed, with logp_old scored at those weights."""
        config = self.config
        learnt: list[Trajectory] = []  # the leader's own; the others read theirs
        shared = self.team.share(f"episodes of step {step}", lambda: self._play_step(step, learnt))
        learnt = learnt or [_load_when_visible(self.workdir / "trajectories" / name) for name in (*shared["kept"], *shared["shown"])]
        batch = pack(
            learnt, row_length=config.row_length, chunks_per_row=config.chunks_per_row, gamma=config.gamma, failure_reward=config.failure_reward,
            routes_for=self.model_config if config.routing_replay == "rollout" else None,
            advantage=ADVANTAGES.get(config.loss, "normalised"), anchor=config.anchor, denial_penalty=config.denial_penalty,
        )
        self._require_same_rows(step, batch)
        batches = self._with_old(microbatches(batch, config.rows_per_microbatch), state)
        if self.team.leads:
            self.accounting.in_flight -= shared["played"]
            self.accounting.trained += len(shared["kept"])
            self.accounting.dropped["equal_group"] += shared["played"] - len(shared["kept"])
            self.accounting.check()
        return StepData(batches, count_denominators(batches), shared["figures"])

    def _play_step(self, step: int, learnt: list[Trajectory]) -> dict[str, Any]:
        """The leader's part of a step: plays its episodes and puts into `learnt` what is trained on. Returns what the others need."""
        config, began = self.config, time.monotonic()
        rng = random.Random(f"tasks/{config.seed}/{step}")
        tasks = [f"{family}/{train_seed(rng.randrange(1_000_000))}" for family in self.curriculum.draw(config.groups, rng)]
        episodes = [
            Episode(task, group, number, derive_seed(config.seed, task, step, group, number))
            for group, task in enumerate(tasks) for number in range(config.group_size)
        ]
        files = self.workdir / "trajectories"
        name = lambda episode: f"{config.experiment}_{step:06d}_g{episode.group:03d}_e{episode.episode:02d}.json"  # of an episode or its trajectory
        trajectories = self.play(
            episodes, config.temperature, accounting=self.accounting, record=lambda episode: files / name(episode), routes=config.routing_replay == "rollout",
        )
        seconds = time.monotonic() - began
        self.curriculum.observe(trajectories)
        kept = mixed_groups(trajectories) if config.filter_groups else trajectories
        expert_name = lambda number: f"{config.experiment}_{step:06d}_expert_{number:03d}.json"
        shown = self.show_experts(unsolved_tasks(trajectories), lambda number: files / expert_name(number)) if config.lambda_il else []
        learnt.extend(kept + shown)
        return {
            "played": len(trajectories), "kept": [name(one) for one in kept], "shown": [expert_name(number) for number in range(len(shown))],
            "figures": rollout_figures(trajectories, step, seconds) | {"demonstrations": len(shown)},
        }

    def show_experts(self, tasks: list[str], record: Callable[[int], pathlib.Path]) -> list[Trajectory]:
        """Eq. 10's imitation: what an expert does in the tasks that no episode of the step solved."""
        return run_async(collect_experts(
            tasks, self.make_env, self.chat, error_rate=0.0, concurrency=EXPERT_CONCURRENCY, record=record, first_group=self.config.groups,
        ), 60.0 + len(tasks) * self.config.episode_seconds / EXPERT_CONCURRENCY)

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

    def _require_same_rows(self, step: int, batch: Batch) -> None:
        """Each process packs for itself and feeds only its own rows: that they are parts of one batch is checked, not assumed."""
        if self.team.count > 1:
            digest = hashlib.sha256()
            batch.map(lambda field: digest.update(np.ascontiguousarray(field).tobytes()))
            self.team.require_same(f"rows of step {step}", digest.hexdigest())

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        """Held-out tasks, the same ones at every evaluation and with the same sampling seeds. Kept: a resumed run reads it again."""
        stage = self.config.experiment
        path = outcomes_path(self.workdir, stage, step)
        if not self.team.share(f"evaluated at {step}", path.exists):
            if self.config.loss == "cpt":
                found = self._score_held_out_text(state)
                self.team.share(f"evaluation at {step}", lambda: write_outcomes(self.workdir, stage, step, found))
            else:
                self.publish(state)
                self.team.share(f"evaluation at {step}", lambda: self._play_evaluation(step))
        result = evaluation_of(stage, step, self.team.share(f"outcomes at {step}", lambda: read_outcomes(self.workdir, stage, step)))
        self.evals = [kept for kept in self.evals if kept.step != step] + [result]
        self.write_report(step)
        return result

    def _score_held_out_text(self, state: TrainState) -> dict[str, float]:
        """Bits that the model takes for a byte of held-out documents, the same ones at every evaluation."""
        config, documents = self.config, self.corpus.held_out
        texts = [documents[index] for index in range(min(config.eval_documents, len(documents)))]
        batches = microbatches(text_rows(texts, self.chat.tokenizer, row_length=config.row_length, chunks_per_row=config.chunks_per_row), config.rows_per_microbatch)
        nats = -sum(float(np.sum(logp_BT, where=batch.action_mask_BT, dtype=np.float64)) for batch, logp_BT in zip(batches, self.learner.score(state.params, batches)))
        size = sum(len(text.encode()) for text in texts)
        return {"bits_per_byte": nats / math.log(2) / size, "bytes": size}

    def _play_evaluation(self, step: int) -> None:
        config = self.config
        tasks = [(family, f"{family}/{eval_seed(index)}") for family in (*FAMILIES, *HELD_OUT_FAMILIES) for index in range(config.eval_tasks)]
        # Another seed gives other tasks: results of several runs can be pooled.
        episodes = [Episode(_shifted(task, config.seed * 10_000), 0, 0, derive_seed(config.seed, "eval", task)) for _, task in tasks]
        trajectories = self.play(episodes, config.eval_temperature)
        write_outcomes(self.workdir, config.experiment, step, {"tasks": [
            {"task": trajectory.task, "family": trajectory.family, "success": int(trajectory.reward == 1.0), "unseen_family": trajectory.family in HELD_OUT_FAMILIES}
            for trajectory in trajectories
        ]})

    def host_state(self) -> dict[str, Any]:
        stream = None if self.stream is None else self.stream.get_state()
        text = None if self.corpus is None else self.corpus.digest
        return {"accounting": self.accounting.to_json(), "seconds": self.seconds(), "stream": stream, "text": text, "success_rates": self.curriculum.rates}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        if self.corpus is not None and self.corpus.digest != host.get("text"):  # a position in another text would mean nothing
            raise ValueError(f"the text under {self.config.text or 'the standard library'} is not what the checkpoint of step {step} was trained on. Bring it back, or give another --workdir.")
        self.accounting = Accounting.from_json(host["accounting"])
        self.seconds_before = host["seconds"]
        self.curriculum = Curriculum(FAMILIES, host["success_rates"])
        stage = self.config.experiment
        done = sorted(int(path.stem.rpartition("_")[2]) for path in outcomes_path(self.workdir, stage, 0).parent.glob(f"{stage}_*.json"))
        self.evals = [evaluation_of(stage, number, read_outcomes(self.workdir, stage, number)) for number in done if number <= step]
        if host["stream"] is not None:
            self.stream = self._open_stream()
            self.stream.set_state(host["stream"])

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def write_report(self, step: int) -> None:
        if not self.team.leads:
            return
        self.accounting.check()
        write_report(self.workdir, {
            "experiment": self.config.experiment, "preset": self.config.preset, "loss": self.config.loss, "seed": self.config.seed, "steps": step,
            "wall_seconds": round(self.seconds(), 1), "isolation": self.isolation, "evals": [*self.earlier_evals, *self.evals],
            "accounting": self.accounting.to_json(),
        })

    def export(self, state: TrainState) -> None:
        """WORKDIR/final: the trained weights for launch.serve and for the experiment that starts here. There, or not at all."""
        partial, final = self.workdir / "final.tmp", self.workdir / "final"
        save_hf(state.params, self.model_config, partial)

        def finish() -> None:
            self.chat.tokenizer.save(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

        self.team.share("final", finish)

    def close(self) -> None:
        if self.pool is not None:
            run_async(self.pool.close(), 30.0)
        if self.server is not None:
            self.server.stop()

    def _open_stream(self):
        """Documents, or expert trajectories, played where they are not on disk yet, as an endless stream of batches."""
        config = self.config
        shape = {"rows": config.rows, "row_length": config.row_length, "chunks_per_row": config.chunks_per_row, "seed": config.seed}
        if config.loss == "cpt":
            return iter(text_batches(self.corpus.training, self.chat.tokenizer, **shape))
        rng = random.Random(f"experts/{config.seed}")
        tasks = [f"{FAMILIES[number % len(FAMILIES)]}/{train_seed(rng.randrange(1_000_000))}" for number in range(config.expert_episodes)]
        path = lambda number: self.workdir / "trajectories" / f"expert_{number:06d}.json"

        def play() -> None:
            self.display.note(f"experts play {len(tasks)} tasks of {len(FAMILIES)} families in the sandbox")
            trajectories.extend(run_async(collect_experts(
                tasks, self.make_env, self.chat, error_rate=config.expert_error_rate, concurrency=EXPERT_CONCURRENCY,
                record=path,
            ), 60.0 + len(tasks) * config.episode_seconds / EXPERT_CONCURRENCY))

        trajectories: list[Trajectory] = []
        self.team.share("experts", play)
        trajectories = trajectories or [_load_when_visible(path(number)) for number in range(len(tasks))]
        return iter(sft_batches(trajectories, **shape))


def start_run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, *, isolation: str, team: Team, display: Display,
    earlier_evals: list[Evaluation],
) -> Run:
    """Builds the learner of this config; raises what is wrong with it before anything is started."""
    tokenizer = Tokenizer.load(config.tokenizer)
    model_config = model_of(config)
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, model {config.model} a vocabulary of {model_config.vocab_size}. Choose ones that fit.")
    model_config = dataclasses.replace(model_config, eos_token_id=tokenizer.im_end, pad_token_id=tokenizer.pad)
    corpus = open_corpus(config, display) if config.loss == "cpt" else None
    learner = make_learner(config, model_config)
    # The tiny model learns the form of a tool call from the experts; a real one is told the tools as in its own chat template.
    chat = Chat(tokenizer, tools=None if config.model == "tiny" else [BASH_TOOL])
    (workdir / "trajectories").mkdir(parents=True, exist_ok=True)
    return Run(config, workdir, model_config, chat, learner, team, isolation, display, earlier_evals, corpus)


def open_corpus(config: ml_collections.ConfigDict, display: Display) -> Corpus:
    corpus = read_corpus(config.text, config.held_out_share)
    skipped = f"; {len(corpus.skipped)} skipped, empty or not UTF-8 text ({corpus.skipped[0]}{', ...' if len(corpus.skipped) > 1 else ''})" if corpus.skipped else ""
    display.note(f"text: {len(corpus.training)} documents to train on, {len(corpus.held_out)} held out{skipped}")
    return corpus


def model_of(config: ml_collections.ConfigDict) -> ModelConfig:
    """The preset, as the config's learner wants it trained."""
    learner = config.learner
    return dataclasses.replace(
        PRESETS[config.model], remat=learner.remat, capacity_factor=learner.capacity_factor, router_z_loss_coef=learner.router_z_loss_coef)


def make_learner(config: ml_collections.ConfigDict, model_config: ModelConfig, devices: Sequence[Any] | None = None) -> Learner:
    """The learner of a config, on all devices of this machine or on the given ones."""
    optimizer = make_optimizer(
        learning_rate=config.learning_rate, warmup_updates=config.warmup_updates, decay_updates=config.decay and config.steps * config.updates_per_step,
        weight_decay=config.weight_decay, clip=config.clip,
    )
    # A likelihood is maximised as it is; a policy's logprobs are those of its sampling temperature.
    temperature = 1.0 if config.loss in LIKELIHOODS else config.temperature
    mesh = make_mesh(config.mesh.to_dict(), model_config, devices)
    if devices is None:
        check_mesh_spans(mesh)
    kernels = Kernels(config.learner.attention, config.learner.experts, config.learner.exchange)
    return Learner(model_config, LOSSES[config.loss], loss_config(config), optimizer, mesh, temperature, kernels, config.learner.offload_moments)


def train(run: Run, init_directory: pathlib.Path | None) -> TrainState:
    """Starts or resumes the run and trains to its end, or to the step at which the user asked to stop."""
    config, learner = run.config, run.learner
    checkpoints = Checkpoints(run.workdir / "checkpoints", config.checkpoints_kept)
    step = run.team.share("checkpoint", checkpoints.latest)
    if step is None:
        state = learner.init(config.seed) if init_directory is None else learner.start(load_start(init_directory, run.model_config, learner.mesh))
    else:
        state, host = checkpoints.restore(learner.state, step)
        run.load_host_state(step, host)
        run.display.note(f"resumed at step {step}")
    run.team.meet("state")  # some had to compile what made it, others found it compiled; gloo gives them 30 s to reach a collective together
    stage = Stage(
        name=config.experiment, steps=config.steps, updates_per_step=config.updates_per_step, evaluate_every=config.eval_every,
        checkpoint_every=config.checkpoint_every, collect=run.collect_batches if config.loss in LIKELIHOODS else run.collect_rollouts,
        publish=(lambda state: None) if config.loss in LIKELIHOODS else run.publish, evaluate=run.evaluate, host_state=run.host_state, should_stop=run.team.should_stop,
        team=run.team,
    )
    try:
        run.start_engines(state)
        run.team.meet("engines")  # the leader alone has waited for them
        with MetricsWriter(run.workdir, stage.name, resume_step=-1 if step is None else step, writes=run.team.leads) as metrics:
            state = run_stage(stage, learner, state, checkpoints, metrics, run.display)
        run.write_report(int(state.step))
        if int(state.step) == config.steps:
            run.export(state)  # last: a workdir with final/ is complete
    except BaseException as error:
        run.team.part(error)
        raise
    finally:
        checkpoints.close()
        run.close()
    return state


def load_start(directory: pathlib.Path, model_config: ModelConfig, mesh: Mesh) -> dict:
    """float32 parameters of a Hugging Face directory, or of what launch.convert made of one, straight to their places on the mesh."""
    ours = {name: getattr(model_config, name) for name in ("dtype", "remat", "scan_layers", "capacity_factor", "router_z_loss_coef")}  # not the checkpoint's affair
    loaded, shardings = read_config(directory, **ours), param_shardings(mesh, model_config)
    if loaded != model_config:
        raise ValueError(f"{directory} holds another model than --config.model asks for: {loaded}, not {model_config}")
    if (directory / "checkpoints").is_dir():
        return StoredParameters(directory / "checkpoints", saved_steps(directory / "checkpoints")[-1], model_config).restore(shardings, jnp.float32)
    return load_hf(directory, shardings=shardings, **ours)[0]


def _shifted(task: str, offset: int) -> str:
    family, seed = task.split("/")
    return f"{family}/{int(seed) + offset}"


def _load_when_visible(path: pathlib.Path) -> Trajectory:
    """A trajectory that the leader says it has written."""
    ends = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.2)
    if not path.exists():
        raise FileNotFoundError(f"{path}, written by process 0, is not seen here within {VISIBLE_SECONDS:.0f} s; is --workdir on a file system that all hosts share?")
    return load_trajectory(path)
