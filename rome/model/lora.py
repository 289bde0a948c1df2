"""Low-rank adapters: which matrices have one, their shapes, start and places on a mesh.

Every expert has an A and a B of its own, as in PEFT, and so does each of q, k, v, o, gate, up and
down; the router, norms, embedding and head have none. Adapters are a pytree beside the parameters'
own, with a pair where those have a matrix:

    {"layers": {"attention": {"q_lora": {"a" [L, D, r], "b" [L, r, N, H]}, ...}, ...}}

L layers, D model, N heads, H head dim, r rank; of any matrix: S layers and experts, I inputs, O
outputs.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from rome.model.config import ModelConfig
from rome.model.ops.low_rank import SUFFIX
from rome.model.params import PARAM_AXES, parameter_shapes
from rome.model.sharding import partition_spec
from rome.model.stacking import Params


class Matrix(NamedTuple):
    """A matrix of the layers that can have an adapter.

    Attributes:
      word: its name in `targets` and in PEFT.
      stacked: first axes, which count layers and experts.
      inputs: axes after those that are the input of the linear map.
    """

    word: str
    stacked: int
    inputs: int


MATRICES = {  # group and name of the parameter under "layers"
    ("attention", "q"): Matrix("q_proj", 1, 1),
    ("attention", "k"): Matrix("k_proj", 1, 1),
    ("attention", "v"): Matrix("v_proj", 1, 1),
    ("attention", "o"): Matrix("o_proj", 1, 2),
    ("moe", "gate"): Matrix("gate_proj", 2, 1),
    ("moe", "up"): Matrix("up_proj", 2, 1),
    ("moe", "down"): Matrix("down_proj", 2, 1),
    ("mlp", "gate"): Matrix("gate_proj", 1, 1),
    ("mlp", "up"): Matrix("up_proj", 1, 1),
    ("mlp", "down"): Matrix("down_proj", 1, 1),
}
GROUPS = {"attention": ("attention",), "experts": ("moe",), "mlp": ("mlp",)}
WORDS = ("all", *GROUPS, *dict.fromkeys(matrix.word for matrix in MATRICES.values()))

Target = tuple[str, str]  # a key of MATRICES


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of one model.

    Attributes:
      rank: columns of each A.
      alpha: products are scaled by alpha / rank.
      targets: the matrices that have one.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]

    @property
    def scale(self) -> float:
        """Return the factor of every product A B."""
        return self.alpha / self.rank


def find_targets(text: str, config: ModelConfig) -> tuple[Target, ...]:
    """Return the matrices of a model that a comma-separated list of WORDS names.

    Raises:
      ValueError: a word is unknown, or the model has nothing of that name.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in WORDS]
    if unknown or not words:
        raise ValueError(
            f"lora.targets={text!r}: {f'{unknown[0]!r} is unknown' if unknown else 'it is empty'}."
            f" Give one or more of {', '.join(WORDS)}"
        )
    layers = parameter_shapes(config)["layers"]
    present = [target for target in MATRICES if target[1] in layers.get(target[0], {})]
    found: set[Target] = set()
    for word in words:
        named = {target for target in present if _is_named(target, word)}
        if not named:
            has = [known for known in WORDS if any(_is_named(one, known) for one in present)]
            raise ValueError(
                f"lora.targets={text!r}: {word!r} matches nothing in this model. Give one or more"
                f" of {', '.join(has)}"
            )
        found |= named
    return tuple(target for target in MATRICES if target in found)


def _is_named(target: Target, word: str) -> bool:
    return word in ("all", MATRICES[target].word) or target[0] in GROUPS.get(word, ())


def adapter_shapes(config: ModelConfig, lora: Lora) -> Params:
    """Return a jax.ShapeDtypeStruct for each array of the adapters, float32."""
    layers = parameter_shapes(config)["layers"]
    shapes: Params = {}
    for group, name in lora.targets:
        weight = layers[group][name].shape
        _, stacked, inputs = MATRICES[group, name]
        a = (*weight[: stacked + inputs], lora.rank)
        b = (*weight[:stacked], lora.rank, *weight[stacked + inputs :])
        shapes.setdefault(group, {})[name + SUFFIX] = {
            "a": jax.ShapeDtypeStruct(a, jnp.float32),
            "b": jax.ShapeDtypeStruct(b, jnp.float32),
        }
    return {"layers": shapes}


def adapter_shardings(mesh: Mesh, config: ModelConfig, lora: Lora) -> Params:
    """Return a NamedSharding for each array of the adapters.

    A lies as the inputs of its matrix, B as its outputs; the rank is whole on every device.
    """

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        _, group, pair, which = (key.key for key in path)
        name = pair.removesuffix(SUFFIX)
        axes = PARAM_AXES[f"layers/{group}/{name}"]
        _, stacked, inputs = MATRICES[group, name]
        if which == "a":
            own = (*axes[: stacked + inputs], None)
        else:
            own = (*axes[:stacked], None, *axes[stacked + inputs :])
        return NamedSharding(mesh, partition_spec(own))

    return jax.tree_util.tree_map_with_path(place, adapter_shapes(config, lora))


def init_adapters(config: ModelConfig, lora: Lora, key: Array) -> Params:
    """Return fresh adapters, which change nothing: every B is 0.

    A is uniform in +-1 / sqrt(inputs), as in PEFT. An array's numbers do not depend on which other
    matrices have adapters.
    """

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Array:
        _, group, pair, which = (key.key for key in path)
        if which == "b":
            return jnp.zeros(shape.shape, shape.dtype)
        _, stacked, inputs = MATRICES[group, pair.removesuffix(SUFFIX)]
        bound = 1 / math.sqrt(math.prod(shape.shape[stacked : stacked + inputs]))
        own = jax.random.fold_in(key, zlib.crc32(f"{group}/{pair}".encode()))
        return jax.random.uniform(own, shape.shape, shape.dtype, -bound, bound)

    return jax.tree_util.tree_map_with_path(draw, adapter_shapes(config, lora))


def merge(base: Params, adapters: Params, lora: Lora, dtype: Any) -> Params:
    """Return the base with the adapters' products added, in float32 and then rounded to `dtype`."""
    layers = dict(base["layers"])
    for group, name in lora.targets:
        weight = layers[group][name]
        pair = adapters["layers"][group][name + SUFFIX]
        stack = math.prod(weight.shape[: MATRICES[group, name].stacked])
        a_SIr = pair["a"].reshape(stack, -1, lora.rank)
        b_SrO = pair["b"].reshape(stack, lora.rank, -1)
        product_SIO = jnp.matmul(a_SIr, b_SrO, precision=jax.lax.Precision.HIGHEST)
        merged = weight.astype(jnp.float32) + lora.scale * product_SIO.reshape(weight.shape)
        layers[group] = layers[group] | {name: merged}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), base | {"layers": layers})


def with_adapters(base: Params, adapters: Params, lora: Lora) -> Params:
    """Return the parameters of a model that runs with its adapters: the base, pairs beside it."""
    layers = dict(base["layers"])
    for group, pairs in adapters["layers"].items():
        own = dict(layers[group])
        for name, pair in pairs.items():
            own[name] = {"a": pair["a"], "b": lora.scale * pair["b"]}
        layers[group] = own
    return base | {"layers": layers}
