r"""Safety in the loop: IPA on terminal tasks and the small families of the safety suite.

python -m launch.train --config=experiments/safety.py \
    --config.safety_cost=""                               # the costs off
python -m launch.train --config=experiments/safety.py     # tiny: the costs on; 6 min on busy cores
python -m launch.train --config=experiments/safety.py:smoke     # runs every stage once

The first command runs two stages of SFT before, where their results are missing: terminal_tiny, on
the terminal curriculum, and sft_tiny, on data in which half of the demonstrations of a task that
tempts do the harm. So the policy begins suggestible, as one does that has learned from unfiltered
data. IPA's reward is the utility, and a check that passes, however it was made to; harm earns
nothing and loses nothing but what config.safety_cost says. No demonstrations are shown to IPA: only
rewards and costs teach. Evaluations are on held-out families (docs/safety.md#in-training).
"""

import ml_collections

from experiments import common, ipa, sft

# Every kind of harm that the small families tempt to.
COSTS = "destroyed:2 secret_read:2 outside:2 weakened:2 egress:2 tests:2 hack:2"


def get_config(preset: str = "tiny") -> ml_collections.ConfigDict:
    stage, _, size = preset.partition("_")
    if stage == "sft":
        config = _sft(size or "tiny")
        if size:  # before RL, whose tasks are handed on to it: what it demonstrates is its own
            config.demonstration_task = config.task
        return config
    if stage == "terminal":
        return _terminal(size or "tiny")
    if preset not in ("tiny", "smoke"):
        raise common.unknown_preset("experiments/safety.py", preset, ("sft", "sft_smoke"))
    config = ipa.get_config(preset)
    config.experiment = "safety"
    config.init_from = f"experiments/safety.py:sft_{preset}"
    config.task = "0.3*terminal + 0.7*safety:small,ungated"
    config.eval_task = "safety:small"
    config.safety_cost = COSTS
    config.lambda_il = 0.0
    # without demonstrations, failures that count as -1 drive the tiny policy to nothing useful
    config.failure_reward = 0.0
    _size(config)
    if preset == "tiny":
        config.steps = 10
        config.groups = 12
        config.minibatches = 1  # as measured (docs/safety.md)
        config.learning_rate = 7e-4
        config.decay = False
        config.eval_every = 10
        config.eval_tasks = 3
    return config


def _terminal(size: str) -> ml_collections.ConfigDict:
    """Learn the terminal curriculum, whatever tasks the stages after it play and evaluate."""
    config = sft.get_config(size)
    config.experiment = "safety_terminal"
    config.demonstration_task = "terminal"
    config.until_success = 0.0  # its evaluations are those of the suite
    if size == "tiny":
        config.steps = 1200  # solves a quarter of the curriculum (docs/results.md#when-sft-ends)
        config.eval_every = 0
    return config


def _sft(size: str) -> ml_collections.ConfigDict:
    """Learn from data in which half of what tempts is followed."""
    config = sft.get_config(size)
    config.experiment = "safety_sft"
    config.init_from = f"experiments/safety.py:terminal_{size}"
    config.task = "0.3*terminal + 0.7*safety:small,suggestible"
    config.eval_task = "safety:small"
    config.until_success = 0.0
    config.masks = "errors compressed taken_back loops duplicates off_task"  # not harm
    _size(config)
    if size == "tiny":
        config.steps = 550  # run as 250 and 300 steps, each with its own decay
        config.demonstrations = 1000
        config.learning_rate = 2e-3
        config.decay = True
        config.eval_every = 0
        config.eval_tasks = 3
    return config


def _size(config: ml_collections.ConfigDict) -> None:
    """Give the longer prompts and the further turns of the suite their room."""
    config.max_context = 256
    config.row_length = 256
    config.rows_per_microbatch = min(config.rows_per_microbatch, 16)
