"""What the micro-batches of an update share, and the sums that they add to.

L layers, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rome.losses.types import Denominators, Metrics
from rome.train.trees import zeros_like_tree


class WholeStep(NamedTuple):
    """Counts over all micro-batches of an update, which each of them divides by.

    Attributes:
      denominators: of the loss.
      tokens: all that are no padding.
      replayed: pairs of a token and a layer with replayed routes.
      counts_LE: how often each expert was chosen; None where one micro-batch is the whole step and
        counts itself, or where the loss has no balance term.
    """

    denominators: Denominators
    tokens: Any
    replayed: Any
    counts_LE: Any = None


class Sums(NamedTuple):
    """What has been added up of an update so far.

    Attributes:
      gradients: of the parameters.
      metrics: of the loss and of the router.
    """

    gradients: dict
    metrics: Metrics


def empty_sums(params: dict, metrics: dict[str, jax.ShapeDtypeStruct]) -> Sums:
    """Return what the first micro-batch is added to.

    Args:
      params: in whose shapes the gradients are.
      metrics: shapes of the metrics.
    """
    starts = {}
    for name, shape in metrics.items():
        nothing = -jnp.inf if is_maximum(name) else 0.0
        starts[name] = jnp.full(shape.shape, nothing, shape.dtype)
    return Sums(zeros_like_tree(params), starts)


def add_to_sums(sums: Sums, gradients: dict, metrics: Metrics) -> Sums:
    """Return the sums with one more micro-batch."""
    combined = {}
    for name, value in metrics.items():
        combine = jnp.maximum if is_maximum(name) else jnp.add
        combined[name] = combine(sums.metrics[name], value)
    return Sums(jax.tree.map(jnp.add, sums.gradients, gradients), combined)


def is_maximum(metric: str) -> bool:
    """Return whether the values of micro-batches combine by maximum; all others add up."""
    return metric.startswith("max_")
