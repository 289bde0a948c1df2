"""float32 means float32, on accelerators too."""

import jax
import jax.numpy as jnp
import pytest

from rome.model.precision import use_full_precision


@pytest.mark.parametrize(
    "backend, dtype, is_full",
    [
        ("gpu", "float32", True),
        ("tpu", "float32", True),
        ("gpu", "bfloat16", False),
        ("cpu", "float32", False),
    ],
)
def test_products_of_a_float32_model_are_computed_in_float32(monkeypatch, backend, dtype, is_full):
    before = jax.config.jax_default_matmul_precision
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x_22 = jnp.ones((2, 2))
    try:
        use_full_precision(dtype)
        program = str(jax.make_jaxpr(lambda a_22: jnp.einsum("ij,jk->ik", a_22, a_22))(x_22))
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert ("HIGHEST" in program) == is_full
