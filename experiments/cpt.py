r"""Continual pre-training: the next token of plain text and code, before SFT.

python -m launch.train --config=experiments/cpt.py --config.text=DIR     # tiny: 1 to 2 min on 2 CPU cores
python -m launch.train --config=experiments/cpt.py:smoke                 # seconds; without a text it reads Python's own library
python -m launch.train --config=experiments/sft.py --config.init_from=experiments/cpt.py     # SFT from its result

DIR holds .jsonl files (a document a line, under "text") and text files of any kind, each a
document. Held-out documents tell the bits a byte: on Python's library the tiny preset goes from 8.1
to 2.4.
"""

import ml_collections

from experiments.sft import PODS


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "cpt"
    config.preset = preset
    config.seed = 0
    config.init_from = ""  # a Hugging Face directory; empty: random weights
    config.model = "tiny"  # a preset of rome/model/config.py
    config.tokenizer = "rome/model/tokenizer/tiny"
    config.loss = "cpt"
    config.text = ""  # a folder or a file; empty: the source of Python's standard library
    config.held_out_share = 0.02  # of the documents, never trained on
    config.eval_documents = 10  # of the held-out ones
    config.steps = 400
    config.updates_per_step = 1
    config.rows = 16  # rows a step
    config.row_length = 160  # tokens a row
    config.chunks_per_row = 16  # pieces of documents a row
    config.rows_per_microbatch = 16
    config.learning_rate = 3e-3
    config.warmup_updates = 50
    config.decay = False  # cosine to a tenth over the stage; False: constant
    config.weight_decay = 0.1
    config.clip = 1.0
    config.eval_every = 0  # steps; 0: only at step 0 and at the end
    config.checkpoint_every = 100
    config.checkpoints_kept = 2
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
        config.steps = 20
        config.eval_documents = 2
    elif preset in PODS:
        _pod(config, preset)
    elif preset != "tiny":
        raise ValueError(
            f"experiments/cpt.py has no preset {preset!r}; there are tiny, smoke, {', '.join(PODS)}"
        )
    return config


def _pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Not run here: the same stage at the size that a pod trains."""
    config.model = preset
    config.tokenizer = config.init_from = PODS[preset].checkpoint
    config.steps = 10_000
    config.rows = 4 * PODS[preset].rows
    config.row_length, config.chunks_per_row, config.rows_per_microbatch = (
        8192,
        64,
        PODS[preset].rows,
    )
    config.learning_rate, config.warmup_updates, config.decay = 1e-5, 200, True
    config.eval_documents, config.eval_every = 1000, 500
    config.learner.remat = "full"
    config.mesh.update(PODS[preset].mesh)
