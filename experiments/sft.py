r"""SFT on expert trajectories of the terminal curriculum: the start of experiments/ipa.py.

python -m launch.train --config=experiments/sft.py            # tiny: 4 to 8 min on 2 CPU cores, until a quarter of the held-out tasks is solved
python -m launch.train --config=experiments/sft.py:smoke      # under a minute, checks that the way is open

The scripted experts play in real sandboxes and sometimes err; their erroneous turns are read but
not learnt (Eq. 1-2 of "Let It Flow").
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
    config.experiment = "sft"
    config.preset = preset
    config.seed = 0
    # a Hugging Face directory, or the path of an experiment; empty: random weights
    config.init_from = ""
    config.model = "tiny"  # a preset of rome/model/config.py
    config.tokenizer = "rome/model/tokenizer/tiny"
    config.loss = "sft"
    config.steps = 2400  # at most
    # held-out success at which the stage ends: IPA starts where many outcomes are open; 0: all
    # steps are run
    config.until_success = 0.25
    config.updates_per_step = 1
    config.rows = 8  # rows a step
    config.row_length = 160  # tokens a row
    config.chunks_per_row = 16
    config.rows_per_microbatch = 8
    config.expert_episodes = 3000
    config.expert_error_rate = 0.15  # of an expert's turns are preceded by a typical mistake
    config.learning_rate = 3e-3
    config.warmup_updates = 50
    config.decay = False  # cosine to a tenth over the stage; False: constant
    config.weight_decay = 0.1
    config.clip = 1.0
    config.max_context = 160  # tokens of an episode
    config.max_new_tokens = 48  # tokens of a turn
    config.max_turns = 6
    config.temperature = 1.0
    config.concurrency = 64  # episodes at once
    config.episode_seconds = 120.0
    config.eval_every = 120  # steps; 0: only at step 0 and at the end
    config.eval_tasks = 18  # held-out tasks a family
    config.eval_temperature = 1.0
    config.checkpoint_every = 100
    config.checkpoints_kept = 2
    # comma-separated URLs of SGLang servers; empty: the embedded engine is started
    config.engines = ""
    config.embedded_engines = 1  # how many are started where `engines` names none
    config.mirrors = (  # URLs of launch.mirror, one an engine: weights travel to its host as deltas
        ""
    )
    # of the embedded engine; fewer than `concurrency` would cost cached prefixes
    config.engine_slots = 64
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
        config.steps = 30
        config.until_success, config.eval_every = 0.0, 0
        config.expert_episodes = 200
        config.eval_tasks = 2
    elif preset in PODS:
        _pod(config, preset)
    elif preset != "tiny":
        raise ValueError(
            f"experiments/sft.py has no preset {preset!r}; there are tiny, smoke, {', '.join(PODS)}"
        )
    return config


def _pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Not run here: the same stage at the size that a pod trains."""
    config.init_from = PODS[preset].checkpoint  # a directory with the checkpoint
    config.model = preset
    config.tokenizer = PODS[preset].checkpoint
    config.steps = 1000
    config.until_success, config.eval_every = 0.0, 250
    config.rows = config.rows_per_microbatch = PODS[preset].rows
    config.row_length, config.chunks_per_row = 8192, 128
    config.expert_episodes = 50_000
    config.learning_rate, config.warmup_updates = 1e-5, 50
    config.max_context, config.max_new_tokens, config.max_turns = 8192, 1024, 32
    config.concurrency = 512
    config.episode_seconds = 1800.0
    config.sandbox.isolation = "required"
    config.learner.remat = "full"
    config.mesh.update(PODS[preset].mesh)
