"""A row's sums, and a model's hidden states over pages, do not depend on the size of the call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.config import PRESETS
from rome.model.ops.kernels import Kernels, choose_serving_kernels
from rome.model.ops.row_sums import softmax_of_rows, sum_of_rows
from rome.model.qwen3 import Qwen3, init_params
from rome.model.stacking import unstack_layers
from rome.serve.decoding import CPU_OPTIONS
from rome.serve.programs import Pages, Shapes


@pytest.mark.long
@pytest.mark.parametrize("width", [1, 3, 32, 96, 128, 512])
def test_a_row_is_summed_alike_in_every_company(width):
    x_ND = np.random.RandomState(0).standard_normal((64, width)).astype(np.float32)
    alone = {rows: np.asarray(jax.jit(sum_of_rows)(x_ND[:rows])) for rows in (1, 4, 16, 32, 64)}
    for rows, sums in alone.items():
        np.testing.assert_array_equal(sums, alone[64][:rows])
    np.testing.assert_allclose(alone[64], x_ND.astype(np.float64).sum(axis=1), atol=1e-4)
    shares = np.asarray(softmax_of_rows(jnp.asarray(x_ND)))
    np.testing.assert_allclose(shares, np.asarray(jax.nn.softmax(x_ND)), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kernels", ["chosen", pytest.param("plain", marks=pytest.mark.slow)])
def test_hidden_states_over_pages_do_not_depend_on_how_a_prompt_is_cut(kernels):
    """On the preset that `make train` trains: XLA sums its width otherwise from 32 rows on."""
    config = PRESETS["tiny"]
    forms = choose_serving_kernels("cpu", config)
    if kernels == "plain":
        forms = Kernels("gather", "tiled", "ring")
    params = unstack_layers(init_params(config, jax.random.PRNGKey(0)), config)
    shapes = Shapes(slots=8, max_context=64)
    model = Qwen3(config, scan=False, experts=forms.experts, attention_form=forms.attention)
    shape = (shapes.pages, shapes.page_tokens, 2 * config.num_kv_heads, config.head_dim)
    tokens = np.random.RandomState(0).randint(5, 700, size=32)

    @functools.partial(jax.jit, static_argnums=2, compiler_options=CPU_OPTIONS)
    def compute(params, kv, size, piece, first, count):
        place_T = jnp.arange(size)
        real_T = (place_T < count).astype(jnp.int32)
        rows = shapes.rows(size)
        table_RM = jnp.zeros((rows, shapes.pages_per_row), jnp.int32)
        table_RM = table_RM.at[0].set(jnp.arange(shapes.pages_per_row))
        lengths_R = jnp.zeros(rows, jnp.int32).at[0].set(first + count)
        starts_R = jnp.full(rows + 1, count, jnp.int32).at[0].set(0)
        pages = Pages(kv, table_RM, jnp.zeros(size, jnp.int32), lengths_R, starts_R)
        position_T = jnp.where(real_T == 1, first + place_T, 0)
        out = model.apply({"params": params}, piece[None], position_T[None], real_T[None], pages)
        return out.pages, out.hidden_BTD[0]

    def hidden(pieces):
        kv = tuple(jnp.zeros(shape) for _ in range(config.num_layers))
        found = []
        first = 0
        for count, size in pieces:
            piece = np.zeros(size, np.int32)
            piece[:count] = tokens[first : first + count]
            kv, hidden_TD = compute(params, kv, size, piece, first, count)
            found.append(np.asarray(hidden_TD)[:count])
            first += count
        return np.concatenate(found)

    whole = hidden([(32, 32)])
    cuts = [[(16, 16)] * 2, [(22, 32), (10, 16)], [(15, 16), (17, 32)]]
    if (
        kernels == "chosen"
    ):  # the compiler's optimizations, off in tests, round 4 rows of plain dots
        cuts += [[(4, 4)] * 8, [(1, 4), (15, 16), (16, 32)]]
    for cut in cuts:
        np.testing.assert_array_equal(hidden(cut), whole)
