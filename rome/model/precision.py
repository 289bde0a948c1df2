"""The precision of matrix products in float32."""

from __future__ import annotations

import jax


def use_full_precision(dtype: str) -> None:
    """Let products of float32 arrays be computed in float32, for a model of this dtype.

    GPUs round the factors to TF32 and TPUs to bfloat16 unless told otherwise, each in its own way:
    trainer and engine would differ by more than a proof of weights allows. Other dtypes keep the
    default, and so do CPUs, which always compute in float32.
    """
    if dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")
