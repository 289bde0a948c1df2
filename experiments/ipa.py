r"""IPA, reinforcement learning on interaction chunks, on the terminal curriculum.

python -m launch.train --config=experiments/ipa.py            # tiny: 20 min on 2 CPU cores, and a few for SFT before it
python -m launch.train --config=experiments/ipa.py:smoke      # under a minute, checks that the way is open
python -m launch.train --config=experiments/ipa.py:qwen3_30b_a3b --config.engines=http://a:30000,http://b:30000   # a pod; not run

Baselines: --config.loss=token_level (the paper's Eq. 4-6) or --config.loss=grpo, dr_grpo, rloo,
gspo, dapo, cispo, topr, tis, icepop, gigpo (rome/losses/policy.py says what each is). DAPO's
dynamic sampling is --config.replace_equal.

Asynchronous: --config.async_ratio=1. Resampling from anchors: --config.resampling=parallel (IPA's
Parallelized Initialization) or rollback.
"""

from typing import NamedTuple

import ml_collections


class Pod(NamedTuple):
    """A published checkpoint and the slice that trains it: v5p:4x4x4 for 30B, v5p:8x8x4 for 235B."""

    checkpoint: str  # a Hugging Face directory
    rows: int  # of a micro-batch; one a device
    mesh: dict[str, int]


PODS = {
    "qwen3_30b_a3b": Pod("Qwen3-30B-A3B", 64, {"fsdp": 4, "expert": 16}),
    "qwen3_235b_a22b": Pod("Qwen3-235B-A22B", 256, {"fsdp": 16, "expert": 16}),
}


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "ipa"
    config.preset = preset
    config.seed = 0
    config.init_from = (  # run first where its result is missing; or a Hugging Face directory
        "experiments/sft.py"
    )
    config.model = "tiny"  # a preset of rome/model/config.py
    config.tokenizer = "rome/model/tokenizer/tiny"
    config.loss = "ipa"  # or a baseline, see above
    config.gamma = 0.95  # per chunk; the paper gives no value
    # of pi_old / mu: H of ipa and token_level, C of tis, upper bound of icepop; 0: 5, of tis 2
    config.mismatch_threshold = 0.0
    config.mismatch_low = 0.0  # icepop: tokens below it are dropped; 0: 0.5
    config.mismatch_mask = "chunk"  # ipa: chunk (Eq. 9) or token (Eq. 6)
    config.lambda_rl = 1.0
    config.lambda_il = 1.0
    config.norm = (  # ipa, token_level: the loss is divided by tokens, chunks or trajectories
        "tokens"
    )
    config.failure_reward = -1.0  # 0.0 learns from successes only
    config.negative_weight = 1.0  # of failures beside successes
    # failures with more sampled tokens are only read; 0: all are learnt from
    config.negative_tokens = 0
    # what an episode loses that reached for a network which its sandbox does not grant
    config.denial_penalty = 0.0
    config.clip_low = 0.0  # losses that clip: to [1 - clip_low, 1 + clip_high]; 0: as published
    config.clip_high = 0.0
    # losses that clip: bound of a failure's ratio; 0: none, as published, and refused where samples
    # may be stale
    config.dual_clip = 0.0
    # gigpo: turns are compared after equal history, or where the last observation is equal
    config.anchor = "history"
    config.old = "trainer"  # pi_old scored by the trainer, or "rollout": the engine's own logprobs
    # "rollout": train through the experts that the engine chose; "recompute": that pi_old chose
    config.routing_replay = "off"
    config.steps = 180
    config.groups = 32  # tasks a step, more of them from families whose outcome is open
    config.group_size = 4  # episodes a task
    # groups that all won or all failed compare nothing and are left out
    config.filter_groups = True
    # such a group is replaced by another task at once, up to four times (DAPO's dynamic sampling)
    config.replace_equal = False
    # alpha: a step trains on samples that were begun at most so many versions ago; 0: synchronous
    config.async_ratio = 0
    # samples beyond that bound: wait (there are none), keep, drop (rome/rollout/scheduler.py)
    config.late = "wait"
    # False: a step takes single episodes, whatever the others of their group do
    config.whole_groups = True
    config.redundancy = 0  # further episodes of a group: the first group_size results count
    config.redundant_groups = 0  # further groups a step: the first `groups` complete ones count
    # what is too late plays on for its file instead of being cancelled
    config.keep_redundant = False
    # parallel or rollback: hard tasks begin inside a trajectory that solved them
    # (rome/rollout/anchors.py)
    config.resampling = "off"
    config.resample_share = 0.25  # of a step's groups, at most
    # k3 of engine against trainer, or of a fresh sample's first update, at which the run stops
    config.alarm_kl = 0.1
    config.updates_per_step = 2  # optimizer updates on one step's data, so that ratios act
    config.row_length = 160  # tokens a row
    config.chunks_per_row = 16
    config.rows_per_microbatch = 32
    config.learning_rate = 5e-4
    config.warmup_updates = 5
    config.decay = True  # cosine to a tenth over the stage
    config.weight_decay = 0.0
    config.clip = 1.0
    config.max_context = 160  # tokens of an episode
    config.max_new_tokens = 48  # tokens of a turn
    config.max_turns = 6
    config.temperature = 1.0
    config.concurrency = 64  # episodes at once
    config.episode_seconds = 120.0
    config.eval_every = 30  # steps
    config.eval_tasks = 18  # held-out tasks a family
    config.eval_temperature = 1.0
    config.checkpoint_every = 10
    config.checkpoints_kept = 2
    # comma-separated URLs of SGLang servers; empty: the embedded engine is started
    config.engines = ""
    config.embedded_engines = 1  # how many are started where `engines` names none
    config.mirrors = (  # URLs of launch.mirror, one an engine: weights travel to its host as deltas
        ""
    )
    # of the embedded engine; fewer than `concurrency` would cost cached prefixes
    config.engine_slots = 64
    # so many engines give their devices to the learner while it updates (time division)
    config.lend_engines = 0
    config.sandbox = ml_collections.ConfigDict(
        {
            "isolation": "best_available",
            "memory_mb": 256,
            "pids": 64,
            "disk_mb": 8,
            "command_timeout": 5.0,
            "egress": (
                ""
            ),  # what agents may reach, as in "pypi.org:443 model@127.0.0.1:30000"; nothing by default
            "backend": (
                "embedded"
            ),  # docker: containers of `image`; remote: sandboxes of the ROCK admin at `url`, whose token is in $ROCK_TOKEN
            "image": "",
            "url": "",
        }
    )
    config.learner = ml_collections.ConfigDict(
        {
            "remat": (
                "none"
            ),  # what the backward pass computes again: none, full, attention, offload (rome/model/config.py)
            "attention": "auto",
            "experts": "auto",
            "exchange": "auto",  # kernels by name (rome/model/ops/kernels.py)
            "capacity_factor": 0.0,  # 0: no token is dropped
            "router_z_loss_coef": 0.0,
            "offload_moments": False,  # Adam's moments in the host's memory
        }
    )
    config.mesh = ml_collections.ConfigDict(
        {"replica": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    )
    if preset == "smoke":
        config.steps = 4
        config.groups, config.group_size = 4, 4
        config.eval_every = 4
        config.eval_tasks = 2
    elif preset in PODS:
        _pod(config, preset)
    elif preset != "tiny":
        raise ValueError(
            f"experiments/ipa.py has no preset {preset!r}; there are tiny, smoke, {', '.join(PODS)}"
        )
    return config


def _pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Not run here: the same stage at the size that a pod trains."""
    config.model = preset
    config.tokenizer = PODS[preset].checkpoint  # a directory with tokenizer.json
    config.steps = 500
    config.groups, config.group_size = 64, 16
    config.row_length, config.chunks_per_row, config.rows_per_microbatch = (
        8192,
        128,
        PODS[preset].rows,
    )
    config.learning_rate, config.warmup_updates = 1e-6, 10
    config.max_context, config.max_new_tokens, config.max_turns = 8192, 1024, 32
    config.concurrency = 512
    config.episode_seconds = 1800.0
    config.sandbox.isolation = "required"
    config.learner.remat = "full"
    config.async_ratio = 1
    # in bfloat16 two programs choose different experts; SGLang: --enable-return-routed-experts
    config.routing_replay = "rollout"
    config.mesh.update(PODS[preset].mesh)
