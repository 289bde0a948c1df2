r"""Continual pre-training: next-token prediction on plain text and code, before SFT.

python -m launch.train --config=experiments/cpt.py --config.text=DIR    # tiny: 2 min on 2 CPU cores
python -m launch.train --config=experiments/cpt.py:smoke                # seconds; runs every stage
python -m launch.train --config=experiments/cpt.py:qwen3_30b_a3b \
    --config.text=DIR                                                   # a pod; not run

DIR holds .jsonl files (one document a line, under "text") and text files of any kind, each one
document. Without --config.text, the source of Python's standard library is read. The metric is the
model's bits per byte of held-out documents: on Python's library, `tiny` goes from 8.1 to 2.4.

SFT starts from the result with
python -m launch.train --config=experiments/sft.py --config.init_from=experiments/cpt.py
"""

import ml_collections

from experiments import common


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.experiment = "cpt"
    config.preset = preset
    config.seed = 0
    # a Hugging Face directory, or random; empty: the weights of the model's directory, random ones
    # for a preset
    config.init_from = ""
    config.model = "tiny"  # a preset of rome/model/config.py, or a Hugging Face directory
    config.tokenizer = ""  # a directory; empty: the model's own
    config.loss = "cpt"
    config.text = ""  # a folder or a file; empty: the source of Python's standard library
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
    if preset == "smoke":
        config.steps = 20
        config.eval_documents = 2
    elif preset in common.PODS:
        _apply_pod(config, preset)
    elif preset != "tiny":
        raise common.unknown_preset("experiments/cpt.py", preset)
    return config


def _apply_pod(config: ml_collections.ConfigDict, preset: str) -> None:
    """Set the sizes of a pod. Not run."""
    pod = common.apply_pod_sizes(config, preset)
    config.init_from = pod.checkpoint
    config.steps = 10_000
    config.rows = 4 * pod.rows
    config.row_length = 8192
    config.chunks_per_row = 64
    config.learning_rate = 1e-5
    config.warmup_updates = 200
    config.decay = True
    config.eval_documents = 1000
    config.eval_every = 500
