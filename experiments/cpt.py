r"""Continual pre-training: next-token prediction on plain text and code, before SFT.

python -m launch.train --config=experiments/cpt.py --config.text=DIR    # tiny: 2 min on 2 CPU cores
python -m launch.train --config=experiments/cpt.py:smoke                # seconds; runs every stage
python -m launch.train --config=experiments/cpt.py:qwen3_30b_a3b \
    --config.text=DIR                                                   # a pod; not run

The two stages of "Let It Flow", of what `python -m launch.corpus --out runs/corpus ...` makes:

python -m launch.train --config=experiments/cpt.py:stage2     # repositories, then trajectories
python -m launch.train --config=experiments/cpt.py:stage1     # repositories alone
python -m launch.train --config=experiments/cpt.py:stage2-qwen3_30b_a3b ...
    # 500B tokens, then 300B, 32M a step, rate 3e-5; stage 2 anneals weight decay; not run

DIR holds .jsonl, .parquet and .array_record files (a document a record, under "text") and text
files of any kind, each one document. Without --config.text, the source of Python's standard library
is read. The metric is the model's bits per byte of held-out documents: on Python's library, `tiny`
goes from 8.1 to 2.4.

SFT starts from the result with
python -m launch.train --config=experiments/sft.py --config.init_from=experiments/cpt.py
"""

import ml_collections

from experiments import common

# What `launch.corpus --out runs/corpus` makes, with general text beside it.
STAGES = {
    "stage1": "0.8*runs/corpus/stage1 + 0.2*stdlib",
    "stage2": "0.9*runs/corpus/stage2 + 0.1*runs/corpus/stage1",
}


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "cpt"
    config.preset = preset
    config.seed = 0
    # a Hugging Face directory, an experiment of this file that is run first (with rows of its own),
    # or random; empty: the weights of the model's directory, random ones for a preset
    config.init_from = ""
    config.model = "tiny"  # a preset of rome/model/config.py, or a Hugging Face directory
    config.tokenizer = ""  # a directory; empty: the model's own
    config.loss = "cpt"
    # folders and files, "A + B", or with shares of the documents "0.8*A + 0.2*stdlib";
    # stdlib or empty: the source of Python's standard library
    config.text = ""
    config.held_out_share = 0.02  # of the documents, never trained on
    config.eval_documents = 10  # how many of the held-out documents are evaluated
    config.steps = 400
    config.rows = 16  # rows a step
    config.row_length = 160  # tokens a row
    config.chunks_per_row = 16  # pieces of documents a row
    config.rows_per_microbatch = 16
    config.learning_rate = 3e-3
    config.warmup_updates = 50
    config.decay = False  # True: cosine to a tenth over the stage; False: constant
    config.weight_decay = 0.1
    config.final_weight_decay = -1.0  # reached linearly at the last step; -1: it stays constant
    config.clip = 1.0  # global norm of the gradient
    # leave out an update whose gradient is not finite (counted as skipped_updates), up to 10 steps
    # in a row; False: such a step ends the run at its last good checkpoint
    config.skip_nonfinite_updates = False
    config.eval_every = 0  # steps; 0: only at step 0 and at the end
    config.checkpoint_every = 100
    config.checkpoints_kept = 2
    config.profile_steps = ""  # FIRST:LAST, such as 3:5: traced into WORKDIR/profile; empty: none
    config.learner = common.learner()
    config.lora = common.lora()
    config.mesh = common.mesh()
    stage, _, rest = preset.partition("-")
    size = (rest or "tiny") if stage in STAGES else preset
    if stage in STAGES:
        _apply_stage(config, stage, size)
    if size == "smoke":
        config.steps = 20
        config.eval_documents = 2
    elif size in common.PODS:
        _apply_pod(config, size)
        if stage in STAGES:
            _apply_paper(config, stage)
    elif size != "tiny":
        raise common.unknown_preset(
            "experiments/cpt.py", preset, (*STAGES, "stage1-SIZE", "stage2-SIZE")
        )
    return config


def _apply_stage(config: ml_collections.ConfigDict, stage: str, size: str) -> None:
    """Set the text of one of the two stages, and what the paper changes between them."""
    config.experiment = f"cpt_{stage}"
    config.text = STAGES[stage]
    if stage == "stage2":
        config.init_from = f"experiments/cpt.py:stage1-{size}"
        config.steps = 200
        config.rows = 8
        config.rows_per_microbatch = 8
        config.row_length = 512
        config.learning_rate = 1e-3
        config.warmup_updates = 20
        config.held_out_share = 0.1
        config.final_weight_decay = 0.01


def _apply_paper(config: ml_collections.ConfigDict, stage: str) -> None:
    """Set tokens, batch and rate as the paper states them; it gives no warm-up. Not run."""
    config.rows = 4096  # of 8192 tokens: 32M a step
    config.steps = {"stage1": 14_901, "stage2": 8_941}[stage]  # 500B and 300B tokens
    config.learning_rate = 3e-5
    config.decay = False
    config.held_out_share = 0.001


def _apply_pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Set the sizes of a pod. Not run."""
    pod = common.apply_pod_sizes(config, preset)
    config.init_from = config.init_from or pod.checkpoint
    config.steps = 10_000
    config.rows = 4 * pod.rows
    config.row_length = 8192
    config.chunks_per_row = 64
    config.learning_rate = 1e-5
    config.warmup_updates = 200
    config.decay = True
    config.eval_documents = 1000
    config.eval_every = 500
