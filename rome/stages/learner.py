"""The learner that a config asks for: its loss, optimizer, mesh, kernels, adapters and rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_collections

from rome.losses import SPECS, find_loss
from rome.model.config import ModelConfig
from rome.model.ops.kernels import Kernels
from rome.model.sharding import check_mesh, make_mesh
from rome.stages.own_code import own_loss
from rome.stages.schema import kind_of
from rome.stages.settings import lora_of, loss_config, updates_of_step
from rome.train.distributed import check_mesh_spans
from rome.train.state import make_optimizer
from rome.train.step import Learner
from rome.train.workdir import ConfigError

# Platform and forms of attention with which rows of prefix trees were timed beside separate rows,
# over all cases of benchmarks/prefix_tree.py, and pay.
TREES_PAY = (("cpu", "auto"), ("cpu", "blocked"))


def make_learner(
    config: ml_collections.ConfigDict,
    model_config: ModelConfig,
    devices: Sequence[Any] | None = None,
) -> Learner:
    """Return the learner of a config.

    Args:
      config: of the experiment.
      model_config: of the model that is trained.
      devices: of the mesh; None: all devices of this job.

    Raises:
      ValueError: the mesh divides neither the model nor the rows; the message has what would fit.
    """
    decay_updates = config.steps * math.prod(updates_of_step(config)) if config.decay else 0
    optimizer = make_optimizer(
        learning_rate=config.learning_rate,
        warmup_updates=config.warmup_updates,
        decay_updates=decay_updates,
        weight_decay=config.weight_decay,
        clip=config.clip,
        final_weight_decay=config.final_weight_decay if "final_weight_decay" in config else -1.0,
        updates=config.steps * math.prod(updates_of_step(config)),
    )
    # A likelihood is maximised as it is; a policy's logprobs are those of its sampling temperature.
    temperature = 1.0 if find_loss(config.loss).likelihood else config.temperature
    mesh = make_mesh(config.mesh.to_dict(), model_config, devices)
    if devices is None:
        check_mesh_spans(mesh)
    # Before anything is started: a row that cannot be split would be found when rows are fed.
    check_mesh(model_config, mesh.shape, config.rows_per_microbatch, config.row_length)
    lora = lora_of(config, model_config)
    kernels = Kernels(config.learner.attention, config.learner.experts, config.learner.exchange)
    return Learner(
        model_config,
        own_loss(config),
        loss_config(config),
        optimizer,
        mesh,
        temperature,
        kernels,
        config.learner.offload_moments,
        config.skip_nonfinite_updates,
        lora,
    )


def shares_prefixes(config: ml_collections.ConfigDict, learner: Learner) -> bool:
    """Return whether the rows of a step are prefix trees (`rome.data.prefix_tree`).

    "auto" is on for the published policy losses where trees were measured to pay (TREES_PAY) and
    time is not split. Own losses are left out: they may take index t of a row for its token t.

    Raises:
      ConfigError: learner.prefix_tree=on, and the mesh or the attention does not take it.
    """
    wanted = config.learner.prefix_tree
    if kind_of(config.loss) != "rl" or wanted == "off":
        return False
    sequence = learner.mesh.shape["sequence"]
    attention = learner.chosen_kernels.attention
    if wanted == "auto":
        platform = learner.mesh.devices.flat[0].platform
        return sequence == 1 and (platform, attention) in TREES_PAY and config.loss in SPECS
    if sequence > 1:
        raise ConfigError(
            f"learner.prefix_tree=on takes whole rows, and mesh.sequence={sequence} splits them."
            " Set --config.mesh.sequence=1, or learner.prefix_tree to auto or off."
        )
    return True
