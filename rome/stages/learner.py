"""The learner that a config asks for: its loss, optimizer, mesh, kernels and adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_collections

from rome.losses import find_loss
from rome.model.config import ModelConfig
from rome.model.ops.kernels import Kernels
from rome.model.sharding import make_mesh
from rome.stages.own_code import own_loss
from rome.stages.settings import lora_of, loss_config, updates_of_step
from rome.train.distributed import check_mesh_spans
from rome.train.state import make_optimizer
from rome.train.step import Learner


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
    """
    decay_updates = config.steps * math.prod(updates_of_step(config)) if config.decay else 0
    optimizer = make_optimizer(
        learning_rate=config.learning_rate,
        warmup_updates=config.warmup_updates,
        decay_updates=decay_updates,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    # A likelihood is maximised as it is; a policy's logprobs are those of its sampling temperature.
    temperature = 1.0 if find_loss(config.loss).likelihood else config.temperature
    mesh = make_mesh(config.mesh.to_dict(), model_config, devices)
    if devices is None:
        check_mesh_spans(mesh)
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
