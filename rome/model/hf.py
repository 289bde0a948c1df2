"""Hugging Face checkpoints: safetensors and config.json in both directions, through one table of names.

A checkpoint directory is exactly what `transformers` writes for Qwen3MoeForCausalLM: one tensor per expert and projection, linear weights
as [out, in]. Ours are [in, ...], stacked over layers (and experts), so each row of the table also says how one slice is laid out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from rome.model.config import ModelConfig
from rome.model.qwen3 import init_params

MAX_SHARD_BYTES = 5 * 1000**3
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class _Row:
    """One parameter of ours and the tensors that hold it: `name` has {i} for the layer and {e} for the expert where it is split.

    `inputs` is how many of a slice's first axes are the linear map's input; 0 where the layout is the same on both sides. `flat`: one axis there.
    """

    path: tuple[str, ...]
    name: str
    inputs: int = 0
    flat: bool = False

    @property
    def stacked(self) -> int:
        return ("{i}" in self.name) + ("{e}" in self.name)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        if not self.inputs:
            return array.reshape(-1) if self.flat else array
        return array.reshape(int(np.prod(array.shape[:self.inputs])), -1).T

    def from_hf(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (tensor.T if self.inputs else tensor).reshape(shape)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.flat:
            return (int(np.prod(shape)),)
        rows = int(np.prod(shape[:self.inputs]))
        return (int(np.prod(shape)) // rows, rows) if self.inputs else shape


_LAYER = "model.layers.{i}."
TABLE = (
    _Row(("embed", "embedding"), "model.embed_tokens.weight"),
    _Row(("layers", "attention_norm", "scale"), _LAYER + "input_layernorm.weight"),
    _Row(("layers", "attention", "q"), _LAYER + "self_attn.q_proj.weight", inputs=1),
    _Row(("layers", "attention", "k"), _LAYER + "self_attn.k_proj.weight", inputs=1),
    _Row(("layers", "attention", "v"), _LAYER + "self_attn.v_proj.weight", inputs=1),
    _Row(("layers", "attention", "o"), _LAYER + "self_attn.o_proj.weight", inputs=2),
    _Row(("layers", "attention", "q_bias"), _LAYER + "self_attn.q_proj.bias", flat=True),
    _Row(("layers", "attention", "k_bias"), _LAYER + "self_attn.k_proj.bias", flat=True),
    _Row(("layers", "attention", "v_bias"), _LAYER + "self_attn.v_proj.bias", flat=True),
    _Row(("layers", "attention", "o_bias"), _LAYER + "self_attn.o_proj.bias"),
    _Row(("layers", "attention", "q_norm", "scale"), _LAYER + "self_attn.q_norm.weight"),
    _Row(("layers", "attention", "k_norm", "scale"), _LAYER + "self_attn.k_norm.weight"),
    _Row(("layers", "moe_norm", "scale"), _LAYER + "post_attention_layernorm.weight"),
    _Row(("layers", "moe", "router"), _LAYER + "mlp.gate.weight", inputs=1),
    _Row(("layers", "moe", "gate"), _LAYER + "mlp.experts.{e}.gate_proj.weight", inputs=1),
    _Row(("layers", "moe", "up"), _LAYER + "mlp.experts.{e}.up_proj.weight", inputs=1),
    _Row(("layers", "moe", "down"), _LAYER + "mlp.experts.{e}.down_proj.weight", inputs=1),
    _Row(("layers", "mlp", "gate"), _LAYER + "mlp.gate_proj.weight", inputs=1),
    _Row(("layers", "mlp", "up"), _LAYER + "mlp.up_proj.weight", inputs=1),
    _Row(("layers", "mlp", "down"), _LAYER + "mlp.down_proj.weight", inputs=1),
    _Row(("norm", "scale"), "model.norm.weight"),
    _Row(("head", "kernel"), "lm_head.weight", inputs=1),
)


def save_hf(params: Any, config: ModelConfig, directory: str | pathlib.Path, dtype: Any = None,
            max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes config.json and model.safetensors, or several shards and their index where one would exceed max_shard_bytes.

    Files of an earlier checkpoint in `directory` are replaced, one after the other: to publish while someone watches, write beside the
    place and rename. `dtype` is float32 unless bfloat16 is asked for. Parameters are stacked over layers, on the host or on devices.
    """
    directory = pathlib.Path(directory)
    dtype = _file_dtype(dtype or jnp.float32)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in [*directory.glob("model*.safetensors"), directory / "model.safetensors.index.json"]:
        stale.unlink(missing_ok=True)  # an index or shards of an earlier checkpoint would win over this one
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, tensor in named_tensors(params, config):
        tensor = np.ascontiguousarray(tensor.astype(dtype, copy=False))
        if filled + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    _write_shards(directory, shards)
    spelled = config.to_hf() | {"dtype": str(dtype), "torch_dtype": str(dtype)}
    (directory / "config.json").write_text(json.dumps(spelled, indent=2) + "\n")


def load_hf(directory: str | pathlib.Path, dtype: Any = jnp.float32, **overrides: Any) -> tuple[Any, ModelConfig]:
    """Reads a checkpoint directory into NumPy arrays of `dtype`, stacked over layers.

    `overrides` are ModelConfig fields that config.json does not hold, such as remat="none". Missing, unknown and mis-shaped tensors are
    one error that lists them.
    """
    directory = pathlib.Path(directory)
    config = ModelConfig.from_hf(_read_json(directory / "config.json"), **overrides)
    files = _tensor_files(directory)
    wanted = expected_tensors(config)
    extra = set(files) - set(wanted)
    if config.tie_embeddings:
        extra.discard("lm_head.weight")  # some writers store the tied head a second time
    opened = {path: _open(path) for path in sorted(set(files.values()))}
    shapes = {name: tuple(opened[files[name]].get_slice(name).get_shape()) for name in wanted if name in files}
    _complain(directory, missing=[name for name in wanted if name not in files], extra=sorted(extra),
              misshaped=[f"{name} is {shapes[name]}, not {wanted[name]}" for name in shapes if shapes[name] != wanted[name]])
    dtype = np.dtype(dtype)
    params: dict[str, Any] = {}
    for row, shape in _rows(config):
        array = np.empty(shape, dtype)
        for index, name in _slices(row, shape, config):
            array[index] = row.from_hf(opened[files[name]].get_tensor(name), array[index].shape)
        _insert(params, row.path, array)
    return params, config


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with this config."""
    return {name: row.hf_shape(shape[row.stacked:]) for row, shape in _rows(config) for _, name in _slices(row, shape, config)}


def named_tensors(params: Any, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    for row, shape in _rows(config):
        leaf = params
        for key in row.path:
            if not isinstance(leaf, dict) or key not in leaf:
                raise ValueError(f"parameters have no {'/'.join(row.path)}; expected the stacked pytree of init_params")
            leaf = leaf[key]
        if tuple(leaf.shape) != shape:
            raise ValueError(f"parameter {'/'.join(row.path)} has shape {tuple(leaf.shape)}, the config says {shape}")
        array = np.asarray(jax.device_get(leaf))
        for index, name in _slices(row, shape, config):
            yield name, row.to_hf(array[index])


def _rows(config: ModelConfig) -> Iterator[tuple[_Row, tuple[int, ...]]]:
    """The table's rows that this config has, with the shape of our parameter."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    for row in TABLE:
        leaf = shapes
        for key in row.path:
            leaf = leaf.get(key, {})
        if leaf != {}:  # a tied model has no head
            yield row, tuple(leaf.shape)


def _slices(row: _Row, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    layers = {"moe": config.sparse_layers, "mlp": config.dense_layers}.get(row.path[1], range(config.num_layers))
    for index in np.ndindex(shape[:row.stacked]):
        yield index, row.name.format(**dict(zip("ie", (layers[index[0]], *index[1:]) if index else ())))


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _write_shards(directory: pathlib.Path, shards: list[dict[str, np.ndarray]]) -> None:
    metadata = {"format": "pt"}  # transformers asks for it
    if len(shards) == 1:
        safetensors.numpy.save_file(shards[0], directory / "model.safetensors", metadata)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        safetensors.numpy.save_file(shard, directory / name, metadata)
    index = {"metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
             "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Which file holds each tensor."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        return {name: directory / file for name, file in _read_json(index)["weight_map"].items()}
    if not single.exists():
        raise FileNotFoundError(f"{directory} has neither model.safetensors nor model.safetensors.index.json; is it a checkpoint?")
    return dict.fromkeys(_open(single).keys(), single)


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is named by the index but missing; fetch or write the checkpoint again") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or write the checkpoint again") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; is {path.parent} a Hugging Face checkpoint?") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or write the checkpoint again") from None


def _complain(directory: pathlib.Path, **lists: list[str]) -> None:
    parts = [f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" for kind, names in lists.items() if names]
    if parts:
        raise ValueError(f"{directory} does not hold the tensors its config.json asks for. {'; '.join(parts)}")


def _file_dtype(dtype: Any) -> np.dtype:
    name = np.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r}; checkpoints are written as {' or '.join(_DTYPES)}")
    return _DTYPES[name]
