r"""SFT on demonstrations of the terminal curriculum; experiments/ipa.py starts from its result.

The presets stage1 and stage2 are the two stages of experiments/rome.py (docs/pipeline.md): stage1
learns a filtered mixture after CPT, stage2 the preferred of verified demonstrations after stage1.

python -m launch.train --config=experiments/sft.py          # tiny: 5 to 13 min on 2 CPU cores
python -m launch.train --config=experiments/sft.py:smoke    # under a minute; runs every stage once
python -m launch.train --config=experiments/sft.py:qwen3_30b_a3b \
    --config.engine.urls=http://a:30000                     # a pod; not run

python -m launch.train --config=experiments/sft.py:stage2        # CPT, stage 1, stage 2; not run
python -m launch.train --config=experiments/sft.py:stage2_smoke  # the same in minutes
python -m launch.train --config=experiments/sft.py --config.trajectories=DIR   # your own data

The presets games, mixture and small are what those of experiments/ipa.py start from. The mixture's
250 steps, 1.6 million tokens, solve 4 % (2 to 8) of 184 held-out tasks (34 min on 2 busy cores).

Scripted demonstrators play in real sandboxes and sometimes make a typical mistake. Erroneous turns
stay in the context but are masked from the loss (Eq. 1-2 of "Let It Flow"). The tiny preset ends
as soon as an evaluation solves 35 % of the held-out tasks.
"""

import ml_collections

from experiments import common


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "sft"
    config.preset = preset
    config.seed = 0
    # a Hugging Face directory, the path of an experiment, or random; empty: the weights of the
    # model's directory, random ones for a preset
    config.init_from = ""
    config.model = "tiny"  # a preset of rome/model/config.py, or a Hugging Face directory
    config.tokenizer = ""  # a directory; empty: the model's own
    # The tasks (docs/tasks.md).
    config.task = "terminal"  # what is trained on
    config.eval_task = ""  # what is evaluated; empty: tasks of `task` that are never trained on
    # the first prompt has each environment's tools and system text; False: a small model learns the
    # form of a call from demonstrations
    config.tell_tools = False

    config.loss = "sft"  # or own code (docs/extending.md)
    config.own = common.own("loss")
    config.steps = 2400  # at most, where until_success is set
    # held-out success at which the stage ends: IPA starts where many outcomes are undecided.
    # 0: all steps are run
    config.until_success = 0.35
    config.rows = 8  # rows a step
    config.row_length = 160  # tokens a row
    config.chunks_per_row = 16
    config.rows_per_microbatch = 8
    # files or folders of trajectories to learn from instead of demonstrations, in any known format:
    # "DIR", "A.jsonl + B.parquet", "0.7*DIR + 0.3*FILE" (docs/datasets.md); empty: demonstrations
    config.trajectories = ""
    config.held_out_share = 0.02  # of the records of `trajectories`, never trained on
    config.eval_trajectories = 64  # how many of the held-out records are scored
    # what demonstrators play, such as a mixture; empty: tasks of `task`
    config.demonstration_task = ""
    config.demonstrations = 3000  # tasks that the scripted demonstrators play
    config.demonstration_error_rate = 0.15  # share of turns that a typical mistake precedes
    config.candidates = 1  # demonstrations of each task, of which select=preferred learns the best
    # which demonstrations are learned: filtered, by the five steps of stage 1; preferred, one of
    # each task for stage 2 (docs/pipeline.md); empty: all
    config.select = ""
    config.feedback = ""  # an expert's decisions.jsonl for select=preferred (docs/synthesis.md)
    # turns that are read and not learned: errors, harm that was recorded, and the reasons of
    # rome/data/relevance.py
    config.masks = "errors compressed taken_back loops duplicates off_task harm"
    config.learning_rate = 3e-3
    config.warmup_updates = 50
    config.decay = False  # True: cosine to a tenth over the stage; False: constant
    config.weight_decay = 0.1
    config.clip = 1.0  # global norm of the gradient
    # leave out an update whose gradient is not finite (counted as skipped_updates), up to 10 steps
    # in a row; False: such a step ends the run at its last good checkpoint
    config.skip_nonfinite_updates = False
    # Episodes: demonstrations, and the policy in evaluations.
    config.max_context = 160  # tokens of an episode
    config.max_new_tokens = 48  # tokens of a turn
    config.max_turns = 0  # turns of an episode; 0: the environment's own
    config.temperature = 1.0
    config.concurrency = 64  # episodes at once
    config.episode_seconds = 120.0  # for which the environment may work for one episode
    config.start_seconds = 120.0  # for the start of an environment
    config.eval_every = 120  # steps; 0: only at step 0 and at the end
    # held-out tasks a family; 0, with `trajectories` only: no task is played, no engine started
    config.eval_tasks = 18
    config.eval_temperature = 1.0
    config.checkpoint_every = 100
    config.checkpoints_kept = 2
    config.profile_steps = ""  # FIRST:LAST, such as 3:5: traced into WORKDIR/profile; empty: none
    config.engine = common.engine()
    config.sandbox = common.sandbox()
    config.learner = common.learner()
    config.lora = common.lora()
    config.mesh = common.mesh()
    stage, _, rest = preset.partition("_")
    size = (rest or "tiny") if stage in STAGES else preset
    if size == "smoke":
        config.steps = 30
        config.until_success = 0.0
        config.eval_every = 0
        config.demonstrations = 200
        config.eval_tasks = 2
    elif size == "games":
        _apply_games(config)
    elif size == "mixture":
        _apply_mixture(config)
    elif size == "small":
        _apply_small(config)
    elif size in common.PODS:
        _apply_pod(config, size)
    elif size != "tiny":
        more = (*common.TASK_PRESETS, *STAGES, "stage1_SIZE")
        raise common.unknown_preset("experiments/sft.py", preset, more)
    if stage in STAGES:
        STAGES[stage](config, size)
    return config


def _apply_stage1(config: ml_collections.ConfigDict, size: str) -> None:
    """Learn a filtered mixture of agentic, reasoning and general tasks, after CPT."""
    config.experiment = "sft_stage1"
    config.init_from = f"experiments/cpt.py:{size}"
    config.demonstration_task = "0.7*terminal + 0.15*problems:math + 0.15*problems:text"
    config.select = "filtered"
    if size == "tiny":
        config.until_success = 0.2
        config.eval_every = 200  # an evaluation takes as long as 170 steps
    elif size == "smoke":
        config.demonstrations = 80


def _apply_stage2(config: ml_collections.ConfigDict, size: str) -> None:
    """Learn the preferred of several verified demonstrations of new tasks, after stage 1."""
    config.experiment = "sft_stage2"
    config.init_from = f"experiments/sft.py:stage1_{size}"
    config.candidates = 3
    config.select = "preferred"
    config.until_success = 0.0
    config.learning_rate = 1e-3 if size == "tiny" else config.learning_rate / 2
    config.decay = True
    config.demonstrations = config.demonstrations // 5
    if size == "tiny":
        # Few: after 400 steps on 600 tasks it solves 85 %, and no group is left to compare.
        config.demonstrations = 200
        config.steps = 40
        config.warmup_updates = 5
        config.eval_every = 0
    elif size == "smoke":
        config.demonstrations = 20
        config.steps = 10


def _apply_games(config: ml_collections.ConfigDict) -> None:
    """Learn text games from their planners until a fifth of the boards is solved."""
    common.apply_games(config)
    config.steps = 600
    config.until_success = 0.2
    config.eval_every = 100
    config.eval_tasks = 60


def _apply_mixture(config: ml_collections.ConfigDict) -> None:
    """Learn a mixture of terminal tasks and a world with a scripted user."""
    common.apply_mixture(config)
    config.steps = 250
    config.until_success = 0.0
    config.rows = 4
    config.learning_rate = 2e-3
    config.decay = True
    config.eval_every = 200
    config.eval_tasks = 8


def _apply_small(config: ml_collections.ConfigDict) -> None:
    """Learn all families of the terminal curriculum with a model of 10 M active parameters."""
    common.apply_small(config)
    # After 2 million tokens the loss was 0.17; with 8 rows and a constant rate of 1e-3, 0.25.
    config.steps = 1200
    config.until_success = 0.0
    config.rows = 4
    config.rows_per_microbatch = 4
    config.demonstrations = 6000
    config.learning_rate = 2e-3
    config.warmup_updates = 100
    config.decay = True
    config.eval_every = 600
    config.eval_tasks = 2


def _apply_pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Set the sizes of a pod. Not run."""
    pod = common.apply_pod_sizes(config, preset)
    config.init_from = pod.checkpoint
    config.steps = 1000
    config.until_success = 0.0
    config.eval_every = 250
    config.rows = pod.rows
    config.row_length = 8192
    config.chunks_per_row = 128
    config.demonstrations = 50_000
    config.learning_rate = 1e-5
    config.warmup_updates = 50
    config.max_context = 8192
    config.max_new_tokens = 1024
    config.max_turns = 32
    config.tell_tools = True
    config.concurrency = 512
    config.episode_seconds = 1800.0
    config.start_seconds = 600.0
    config.sandbox.isolation = "required"


STAGES = {"stage1": _apply_stage1, "stage2": _apply_stage2}
