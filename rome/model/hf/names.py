"""One table of tensors: where each parameter lies in a checkpoint of a Qwen3.

A checkpoint holds one tensor per layer, expert and projection, linear weights as [out, in]. Our
parameters are [in, ...], stacked over layers (and experts). Reading, writing and naming all go
through `checkpoint_tensors`, so that the two directions cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rome.model.config import ModelConfig
from rome.model.params import parameter_shapes

# Rows transposed at a time: a whole matrix at once strides through memory and takes several times
# as long.
STRIPE = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter and the tensors that hold it.

    Attributes:
      path: keys of the parameter in the pytree.
      name: of the tensors, with {i} for the layer and {e} for the expert where it is split.
      inputs: number of a slice's first axes that are the linear map's input; 0 where the layout is
        the same on both sides.
      flat: whether the tensor joins all axes to one.
    """

    path: tuple[str, ...]
    name: str
    inputs: int = 0
    flat: bool = False

    @property
    def stacked(self) -> int:
        """Return the number of the parameter's first axes that count layers and experts."""
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
    """One tensor of a checkpoint: a slice of a parameter.

    Attributes:
      name: in the checkpoint.
      path: keys of the parameter in the pytree.
      index: place of the slice on the parameter's stacked axes.
      layer: number of the layer; None outside the layers.
      sizes: of the slice's axes in our layout.
      rows: those of these axes that make up the tensor's first axis.
      columns: those that make up its second axis; none for a vector.
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
        """Return the tensor's shape in the checkpoint."""
        groups = [group for group in (self.rows, self.columns) if group]
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in groups)

    @property
    def transposed(self) -> bool:
        """Return whether rows and columns change places between the two layouts."""
        return bool(self.columns) and self.columns < self.rows

    def blocks(self, itemsize: int, limit: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of the first row axis, each of at most `limit` bytes or one index.

        Args:
          itemsize: bytes of an element.
          limit: bytes of a block.
        """
        size = self.sizes[self.rows[0]]
        index_bytes = math.prod(self.sizes) // size * itemsize
        step = max(1, limit // index_bytes)
        for start in range(0, size, step):
            yield start, min(start + step, size)

    @property
    def rows_each(self) -> int:
        """Return how many rows of the tensor one index of the first row axis has."""
        return math.prod(self.sizes[axis] for axis in self.rows[1:])

    def to_ours(self, block: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
        """Return a block of the tensor in our layout.

        Args:
          block: the tensor, whole or cut at row and column groups.
          sizes: of the slice's axes that the block holds.
        """
        if self.transposed:
            block = _transpose(block)
        return block.reshape(sizes)

    def to_hf(self, piece: np.ndarray) -> np.ndarray:
        """Return a piece of the slice in the checkpoint's layout: the inverse of `to_ours`."""
        columns = math.prod(piece.shape[axis] for axis in self.columns)
        if self.transposed:
            return _transpose(piece.reshape(columns, -1))
        matrix = piece.reshape(-1, columns) if self.columns else piece.reshape(-1)
        return np.ascontiguousarray(matrix)


def checkpoint_tensors(config: ModelConfig) -> list[Tensor]:
    """Return every tensor of a checkpoint with this config, layer by layer."""
    shapes = parameter_shapes(config)
    before: list[Tensor] = []
    in_layers: list[Tensor] = []
    after: list[Tensor] = []
    for row in TABLE:
        leaf = leaf_at(shapes, row.path)
        if leaf is None:  # a tied model has no head
            continue
        tensors = _tensors_of(row, tuple(leaf.shape), config)
        if row.path[0] == "layers":
            in_layers += tensors
        elif row.path[0] == "embed":
            before += tensors
        else:
            after += tensors
    in_layers.sort(key=lambda tensor: tensor.layer or 0)
    return before + in_layers + after


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a checkpoint with this config."""
    return {tensor.name: tensor.shape for tensor in checkpoint_tensors(config)}


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
    """Return the leaf of a pytree of dictionaries at `path`; None where there is none."""
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _tensors_of(row: Row, shape: tuple[int, ...], config: ModelConfig) -> list[Tensor]:
    """Return the tensors that hold one parameter."""
    sizes = shape[row.stacked :]
    axes = tuple(range(len(sizes)))
    if row.inputs:
        rows = axes[row.inputs :]
        columns = axes[: row.inputs]
    elif row.flat:
        rows = axes
        columns = ()
    else:
        rows = axes[:1]
        columns = axes[1:]
    layers: Sequence[int] = range(config.num_layers)
    if row.path[1] == "moe":
        layers = config.sparse_layers
    elif row.path[1] == "mlp":
        layers = config.mlp_layers
    tensors = []
    for index in np.ndindex(shape[: row.stacked]):
        layer = layers[index[0]] if index else None
        expert = index[1] if len(index) > 1 else None
        name = row.name.format(i=layer, e=expert)
        tensors.append(Tensor(name, row.path, index, layer, sizes, rows, columns))
    return tensors


def _transpose(matrix: np.ndarray) -> np.ndarray:
    """Return matrix.T as a new contiguous array.

    Floats move as integers: NumPy copies bfloat16 element by element otherwise.
    """
    bits = matrix.view(f"u{matrix.dtype.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), STRIPE):
        stripe = slice(start, start + STRIPE)
        out[:, stripe] = bits[stripe].T
    return out.view(matrix.dtype)
