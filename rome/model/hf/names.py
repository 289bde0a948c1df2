"""One table: where each parameter of ours lies in a Hugging Face checkpoint of Qwen3MoeForCausalLM,
and how one tensor there is laid out.

A checkpoint holds one tensor per layer, expert and projection, linear weights as [out, in]. Ours
are [in, ...], stacked over layers (and experts). Reading, writing and naming all go through
`checkpoint_tensors`, so that the two directions cannot disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rome.model.config import ModelConfig
from rome.model.qwen3 import init_params

# rows transposed at a time: a whole matrix at once strides through memory and takes several times
# as long
STRIPE = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of ours and the tensors that hold it: `name` has {i} for the layer and {e} for
    the expert where it is split.

    `inputs` is how many of a slice's first axes are the linear map's input; 0 where the layout is
    the same on both sides. `flat`: one axis there.
    """

    path: tuple[str, ...]
    name: str
    inputs: int = 0
    flat: bool = False

    @property
    def stacked(self) -> int:
        return ("{i}" in self.name) + ("{e}" in self.name)


_LAYER = "model.layers.{i}."
TABLE = (
    Row(("embed", "embedding"), "model.embed_tokens.weight"),
    Row(("layers", "attention_norm", "scale"), _LAYER + "input_layernorm.weight"),
    Row(("layers", "attention", "q"), _LAYER + "self_attn.q_proj.weight", inputs=1),
    Row(("layers", "attention", "k"), _LAYER + "self_attn.k_proj.weight", inputs=1),
    Row(("layers", "attention", "v"), _LAYER + "self_attn.v_proj.weight", inputs=1),
    Row(("layers", "attention", "o"), _LAYER + "self_attn.o_proj.weight", inputs=2),
    Row(("layers", "attention", "q_bias"), _LAYER + "self_attn.q_proj.bias", flat=True),
    Row(("layers", "attention", "k_bias"), _LAYER + "self_attn.k_proj.bias", flat=True),
    Row(("layers", "attention", "v_bias"), _LAYER + "self_attn.v_proj.bias", flat=True),
    Row(("layers", "attention", "o_bias"), _LAYER + "self_attn.o_proj.bias"),
    Row(("layers", "attention", "q_norm", "scale"), _LAYER + "self_attn.q_norm.weight"),
    Row(("layers", "attention", "k_norm", "scale"), _LAYER + "self_attn.k_norm.weight"),
    Row(("layers", "moe_norm", "scale"), _LAYER + "post_attention_layernorm.weight"),
    Row(("layers", "moe", "router"), _LAYER + "mlp.gate.weight", inputs=1),
    Row(("layers", "moe", "gate"), _LAYER + "mlp.experts.{e}.gate_proj.weight", inputs=1),
    Row(("layers", "moe", "up"), _LAYER + "mlp.experts.{e}.up_proj.weight", inputs=1),
    Row(("layers", "moe", "down"), _LAYER + "mlp.experts.{e}.down_proj.weight", inputs=1),
    Row(("layers", "mlp", "gate"), _LAYER + "mlp.gate_proj.weight", inputs=1),
    Row(("layers", "mlp", "up"), _LAYER + "mlp.up_proj.weight", inputs=1),
    Row(("layers", "mlp", "down"), _LAYER + "mlp.down_proj.weight", inputs=1),
    Row(("norm", "scale"), "model.norm.weight"),
    Row(("head", "kernel"), "lm_head.weight", inputs=1),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: slice `index` of the parameter at `path`, which is of layer
    `layer` (None outside the layers).

    `sizes` are our axes of that slice. `rows` and `columns` are those of them which make up the two
    axes of the tensor.
    """

    name: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    layer: int | None
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        return tuple(
            math.prod(self.sizes[axis] for axis in group)
            for group in (self.rows, self.columns)
            if group
        )

    @property
    def transposed(self) -> bool:
        return bool(self.columns) and self.columns < self.rows

    def blocks(self, itemsize: int, limit: int) -> Iterator[tuple[int, int]]:
        """Ranges of the first of our axes that make up the tensor's rows, each of at most `limit`
        bytes (but at least one index long).
        """
        size = self.sizes[self.rows[0]]
        step = max(1, limit // (math.prod(self.sizes) // size * itemsize))
        for start in range(0, size, step):
            yield start, min(start + step, size)

    @property
    def rows_each(self) -> int:
        """Rows of the tensor to one index of that axis."""
        return math.prod(self.sizes[axis] for axis in self.rows[1:])

    def to_ours(self, block: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
        """A block of the tensor, whole or cut at row and column groups, as the slice of `sizes`
        that it is in our layout.
        """
        return (_transpose(block) if self.transposed else block).reshape(sizes)

    def to_hf(self, piece: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        columns = math.prod(piece.shape[axis] for axis in self.columns)
        if self.transposed:
            return _transpose(piece.reshape(columns, -1))
        return np.ascontiguousarray(
            piece.reshape(-1, columns) if self.columns else piece.reshape(-1)
        )


def checkpoint_tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint with this config, layer by layer."""
    shapes = parameter_shapes(config)
    tensors = []
    for row in TABLE:
        leaf = leaf_at(shapes, row.path)
        if leaf is None:  # a tied model has no head
            continue
        sizes = tuple(leaf.shape[row.stacked :])
        axes = tuple(range(len(sizes)))
        rows, columns = (
            (axes[row.inputs :], axes[: row.inputs])
            if row.inputs
            else (axes, ())
            if row.flat
            else (axes[:1], axes[1:])
        )
        layers = {"moe": config.sparse_layers, "mlp": config.dense_layers}.get(
            row.path[1], range(config.num_layers)
        )
        for index in np.ndindex(leaf.shape[: row.stacked]):
            layer = layers[index[0]] if index else None
            name = row.name.format(**dict(zip("ie", (layer, *index[1:]))))
            tensors.append(Tensor(name, row.path, index, layer, sizes, rows, columns))
    before, after = (
        [t for t in tensors if t.path[0] == "embed"],
        [t for t in tensors if t.path[0] in ("norm", "head")],
    )
    return (
        before + sorted((t for t in tensors if t.layer is not None), key=lambda t: t.layer) + after
    )


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with this config."""
    return {tensor.name: tensor.shape for tensor in checkpoint_tensors(config)}


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> Any:
    """jax.ShapeDtypeStruct of each parameter, in the structure of init_params."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """What `tree` holds at `path`; None where there is nothing."""
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _transpose(matrix: np.ndarray) -> np.ndarray:
    """matrix.T as a new contiguous array.

    Floats move as integers: NumPy copies bfloat16 element by element otherwise.
    """
    bits = matrix.view(f"u{matrix.dtype.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), STRIPE):
        out[:, start : start + STRIPE] = bits[start : start + STRIPE].T
    return out.view(matrix.dtype)
