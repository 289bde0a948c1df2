r"""IPA, reinforcement learning on interaction chunks, on the terminal curriculum.

python -m launch.train --config=experiments/ipa.py          # tiny: 24 min on 2 CPU cores, after SFT
python -m launch.train --config=experiments/ipa.py:smoke    # under a minute; runs every stage once
python -m launch.train --config=experiments/ipa.py:outside  # played by docs/agents.md's agent
python -m launch.train --config=experiments/ipa.py:qwen3_30b_a3b \
    --config.engine.urls=http://a:30000,http://b:30000      # a pod; not run

The first command runs experiments/sft.py before (5 to 13 min more) where its result is missing. It
went from 45 % (40 to 50) of 396 held-out tasks to 77 % (72 to 80), seed 0, 2026-12-01.

Other tasks (each runs its own SFT before; docs/results.md says what was measured):

python -m launch.train --config=experiments/ipa.py:games    # FrozenLake and Sokoban, tiny
    # random moves solve 23 % and 2 % of held-out boards, SFT of 100 steps 45 % and 13 %, IPA 49 %
    # and 32 % (three seeds, docs/results.md); 10 to 15 min on 2 cores under heavy load
python -m launch.train --config=experiments/ipa.py:mixture  # terminal and a user interface
    # from SFT of 250 steps, 4 % (2 to 8) of 184 held-out tasks, to 2 % (1 to 5): it needs a longer
    # SFT; 28 min on 2 AVX2 cores beside another run
python -m launch.train --config=experiments/ipa.py:small    # 10 M active parameters, all families
    # of the curriculum: SFT of 1,200 steps (2.8 million tokens, 68 min on 2 AVX2 cores and 10 min
    # of demonstrations) solves 8 % (5 to 13) of 170 held-out tasks of 85 families, 0 of 8 tasks of
    # unseen ones; 12 steps of IPA (8 min) 9 % (5 to 14), and 0 of 8. It resumes after any stop

Baselines: --config.loss=token_level (the paper's Eq. 4-6) or --config.loss=grpo, dr_grpo, rloo,
gspo, dapo, cispo, topr, tis, icepop, gigpo (described in rome/losses/policy.py). They learn from
their own episodes alone; --config.lambda_il=1 shows them the demonstrations that ipa learns from
too. DAPO's dynamic sampling is --config.rollout.replace_equal.

Asynchronous: --config.rollout.async_ratio=1. Resampling from anchors:
--config.rollout.resampling=parallel (IPA's Parallelized Initialization) or rollback.
"""

import ml_collections

from experiments import common


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "ipa"
    config.preset = preset
    config.seed = 0
    # an experiment, which is run first where its result is missing, or a Hugging Face directory
    config.init_from = "experiments/sft.py"
    config.model = "tiny"  # a preset of rome/model/config.py, or a Hugging Face directory
    config.tokenizer = ""  # a directory; empty: the model's own

    # The tasks (docs/tasks.md).
    config.task = "terminal"  # what is trained on
    config.eval_task = ""  # what is evaluated; empty: tasks of `task` that are never trained on
    # the first prompt has each environment's tools and system text; False: a small model learns the
    # form of a call from demonstrations
    config.tell_tools = False

    # The loss (rome/losses). A switch of 0 means the value of the loss' own paper.
    # or one of the baselines named above, or own code: package.module:name or path/to/file.py:name
    # (docs/extending.md)
    config.loss = "ipa"
    # how the episodes of a group are compared: normalised, centred, leave_one_out or steps
    # (rome/data/advantages.py), or own code; empty: the way of the loss' own paper
    config.advantage = ""
    config.reward = ""  # own code for the reward that training learns from; empty: the verifier's
    config.filter = ""  # own code that chooses the episodes of a group to train on; empty: all
    config.own = common.own("loss", "advantage", "reward", "filter")
    config.gamma = 0.95  # per chunk; the paper gives no value
    # bound of pi_old / mu: H of ipa and token_level, C of tis, upper bound of icepop; 0: 5, tis 2
    config.mismatch_limit = 0.0
    config.mismatch_low = 0.0  # icepop: tokens below it are dropped; 0: 0.5
    config.mismatch_mask = "chunk"  # ipa: mask by chunk (Eq. 9) or by token (Eq. 6)
    config.clip_low = 0.0  # losses that clip: to [1 - clip_low, 1 + clip_high]
    config.clip_high = 0.0
    # losses that clip: bound of a failure's ratio; 0: none, which is refused for stale samples
    config.dual_clip = 0.0
    config.lambda_rl = 1.0  # weight of the reinforcement term of Eq. 10
    # weight of the imitation term of Eq. 10; 0: no demonstrations are played; -1: the value of the
    # loss' own paper, 1 for ipa and 0 for all others
    config.lambda_il = -1.0
    # ipa, token_level: the loss is divided by the number of trained tokens, chunks or trajectories
    config.norm = "tokens"
    config.failure_reward = -1.0  # of a failed episode; 0.0: learn from successes only
    config.negative_weight = 1.0  # weight of failures relative to successes
    # failures with more sampled tokens are masked from the loss; 0: no limit
    config.negative_tokens = 0
    # costs of harm by kind (docs/safety.md), such as "egress:1 secret_sent:2", taken from the
    # return of the turn that did it; egress: an address was tried that is not granted. "": none
    config.safety_cost = ""
    # weights of what an episode's branches earn, such as "subagent:0.5 rewind:0"; "": all weigh 1.
    # compaction, subagent: turns in a context that was opened so. rewind: turns that were taken
    # back. A turn of weight 0 is only read
    config.edge_credit = ""
    # gigpo groups turns by equal history, or by equal last observation ("observation")
    config.gigpo_state = "history"
    # pi_old: scored by the trainer, or the engine's own logprobs ("rollout")
    config.logp_old_from = "trainer"
    # replay expert choices: of the engine ("rollout") or of the pass that scored pi_old
    # ("recompute")
    config.routing_replay = "off"

    # The optimizer.
    config.steps = 90  # training steps, at most where the stage may end early
    config.groups = 32  # tasks a step; families with undecided outcomes get more of them
    config.group_size = 4  # episodes a task
    config.minibatches = 2  # parts of a step's groups; each is an update of its own
    config.epochs = 2  # passes over a step's data; from the second update on ratios differ from 1
    config.row_length = 160  # tokens a row
    config.chunks_per_row = 16  # turns a row, at most; in CPT pieces of documents
    config.rows_per_microbatch = 32
    config.learning_rate = 5e-4
    config.warmup_updates = 5
    config.decay = True  # cosine to a tenth over the stage
    config.weight_decay = 0.0
    config.clip = 1.0  # global norm of the gradient
    # leave out an update whose gradient is not finite (counted as skipped_updates), up to 10 steps
    # in a row; False: such a step ends the run at its last good checkpoint
    config.skip_nonfinite_updates = False
    # mean k3 estimate of a KL at which the run stops: engine against trainer, or the first update
    # of fresh samples against pi_old
    config.alarm_kl = 0.1

    # Episodes.
    # who plays: plain, the loop of this project; iflow, its agent with a context of its own making;
    # or command:COMMAND, any agent, run in the task's sandbox with OPENAI_BASE_URL and
    # ANTHROPIC_BASE_URL (docs/agents.md)
    config.agent = "plain"
    config.agent_files = ""  # folder that the command finds at $AGENT_FILES
    config.agent_idle_seconds = 120.0  # without a call, after which the command is ended
    config.iflow = ml_collections.ConfigDict()
    # tools of the agent beside those of the environment, as in "task todo"; empty: none
    config.iflow.tools = ""
    config.iflow.compaction = 0.0  # share of max_context at which it is summarised; 0: never
    config.max_context = 160  # tokens of an episode
    config.max_new_tokens = 48  # tokens of a turn
    config.max_turns = 0  # turns of an episode; 0: the environment's own
    config.temperature = 1.0
    config.concurrency = 64  # episodes at once
    config.episode_seconds = 120.0  # for which the environment may work for one episode
    config.start_seconds = 120.0  # for the start of an environment
    config.eval_every = 30  # steps
    config.eval_tasks = 18  # held-out tasks a family
    config.eval_temperature = 1.0
    config.checkpoint_every = 10
    config.checkpoints_kept = 2
    # newest steps whose trajectories stay once no checkpoint needs them; 0: those of all steps
    config.keep_trajectories = 0
    config.profile_steps = ""  # FIRST:LAST, such as 3:5: traced into WORKDIR/profile; empty: none

    config.rollout = _rollout()
    config.engine = common.engine()
    config.sandbox = common.sandbox()
    config.learner = common.learner()
    config.lora = common.lora()
    config.mesh = common.mesh()
    if preset == "smoke":
        config.steps = 4
        config.minibatches = 1
        config.groups = 4
        config.group_size = 4
        config.eval_every = 4
        config.eval_tasks = 2
        config.rollout.filter_groups = False  # hardly trained, all fail; the loss is to see them
    elif preset == "games":
        _apply_games(config)
    elif preset == "mixture":
        _apply_mixture(config)
    elif preset == "small":
        _apply_small(config)
    elif preset == "outside":
        # the agent leaves its tools out of its requests, which the tiny model was never told of
        config.agent = "command:TELL_TOOLS=0 python3 $AGENT_FILES/outside_agent.py"
        config.agent_files = "examples/agents"
        config.steps = 60
        config.groups = 16
        config.eval_tasks = 12
    elif preset in common.PODS:
        _apply_pod(config, preset)
    elif preset != "tiny":
        raise common.unknown_preset("experiments/ipa.py", preset, (*common.TASK_PRESETS, "outside"))
    return config


def _rollout() -> ml_collections.ConfigDict:
    """Return which samples a step takes, and when (rome/rollout/scheduler.py)."""
    rollout = ml_collections.ConfigDict()
    # alpha: a step trains on samples begun at most this many weight versions ago; 0: synchronous
    rollout.async_ratio = 0
    # samples beyond that bound: wait (never let one get so old), keep or drop
    rollout.stale_samples = "wait"
    # leave out groups whose episodes all succeeded or all failed: they compare nothing. A step of
    # such groups alone learns from its demonstrations, or makes no update where it has none
    rollout.filter_groups = True
    # replace such a group by another task at once, up to four times (DAPO's dynamic sampling)
    rollout.replace_equal = False
    # False: a step takes single episodes, whether or not their group is complete
    rollout.whole_groups = True
    rollout.redundancy = 0  # extra episodes of a group; the first group_size results count
    # parallel or rollback: hard tasks start inside a trajectory that solved them
    # (rome/rollout/anchors.py)
    rollout.resampling = "off"
    rollout.resample_share = 0.25  # of a step's groups, at most
    # how many engines give their devices to the learner while it updates (time division)
    rollout.lend_engines = 0
    return rollout


def _apply_games(config: ml_collections.ConfigDict) -> None:
    """Train on text games with the boards and the turns of ROLL's agentic examples."""
    common.apply_games(config)
    config.steps = 30
    config.groups = 16
    config.epochs = 1
    # Failures have twice the tokens of successes. At full weight they taught the policy to write
    # what is no move: up to a quarter of the turns within eleven steps.
    config.negative_weight = 0.2
    config.eval_every = 15
    config.eval_tasks = 100


def _apply_mixture(config: ml_collections.ConfigDict) -> None:
    """Train on a mixture of terminal tasks and a world with a scripted user."""
    common.apply_mixture(config)
    config.steps = 20
    config.groups = 12
    config.epochs = 1
    config.learning_rate = 3e-4
    config.eval_every = 10
    config.eval_tasks = 8
    config.checkpoint_every = 5


def _apply_small(config: ml_collections.ConfigDict) -> None:
    """Train a model of 10 M active parameters on all families of the terminal curriculum."""
    common.apply_small(config)
    config.steps = 30
    config.groups = 12
    config.epochs = 1
    config.learning_rate = 2e-4
    config.eval_every = 15
    config.eval_tasks = 2
    config.checkpoint_every = 5


def _apply_pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Set the sizes of a pod. Compiled (launch/compile.py), not run."""
    common.apply_pod_sizes(config, preset)
    config.steps = 500
    config.groups = 64
    config.group_size = 16
    config.row_length = 8192
    config.chunks_per_row = 128
    config.minibatches = 4
    config.epochs = 1
    config.learning_rate = 1e-6
    config.warmup_updates = 10
    config.max_context = 8192
    config.max_new_tokens = 1024
    config.max_turns = 32
    config.tell_tools = True
    config.concurrency = 512
    config.episode_seconds = 1800.0
    config.start_seconds = 600.0
    config.sandbox.isolation = "required"
    config.rollout.async_ratio = 1
    # In bfloat16 engine and trainer choose different experts. SGLang needs
    # --enable-return-routed-experts.
    config.routing_replay = "rollout"
