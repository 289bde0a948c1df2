"""The adapters (LoRA) that an engine serves by name, in slots of fixed shapes.

An adapter keeps its slot while requests use it, also once it was unloaded: they end with the
adapter that they began with. Only the scheduler's thread uses an `AdapterTable`; other threads may
read `listed`.

L layers, S slots, E experts, I inputs, O outputs (an axis each or several), r rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rome.model.config import ModelConfig
from rome.model.hf.peft import HostAdapters, load_peft, tensor_names
from rome.model.lora import MATRICES, Lora, adapter_shapes, find_targets
from rome.model.ops.experts_for_engine import ADAPTER_SPECS
from rome.model.ops.low_rank import SERVED, SUFFIX, Served
from rome.model.ops.native import LANES
from rome.model.qwen3 import Params
from rome.model.stacking import stack_layers, unstack_layers

AdapterArrays = Params  # "scale" [S], "layers": a tuple of group -> matrix -> "a", "b"


@dataclasses.dataclass(frozen=True)
class AdapterRoom:
    """What an engine keeps room for; a request needs none of it if it names no adapter.

    Attributes:
      count: adapters that are loaded at once; 0: none can be.
      rank: the largest rank.
      targets: matrices that may have adapters, in the words of `config.lora.targets`.
    """

    count: int = 0
    rank: int = 16
    targets: str = "all"

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"--max_loaded_loras must be at least 0, got {self.count}")
        if self.rank < 1:
            raise ValueError(f"--max_lora_rank must be at least 1, got {self.rank}")

    def lora(self, config: ModelConfig) -> Lora:
        """Return the adapters that the arrays have room for.

        Raises:
          ValueError: the targets name nothing that the model has.
        """
        targets = find_targets(self.targets, config)
        rank = math.ceil(self.rank / LANES) * LANES  # whole vectors
        return Lora(rank, float(rank), targets)


@dataclasses.dataclass(eq=False)
class Adapter:
    """A loaded adapter.

    Attributes:
      name: that requests give; free for another adapter once this one was unloaded.
      path: that it was loaded from.
      lora: its rank, factor and matrices.
      slot: of the arrays.
      users: requests that wait or run with it.
      is_loaded: False once it was unloaded.
    """

    name: str
    path: str
    lora: Lora
    slot: int
    users: int = 0
    is_loaded: bool = True


class AdapterTable:
    """Which adapters are loaded, and their arrays on the device.

    Attributes:
      arrays: of all slots; None where there is no room for any.
      listed: name -> path of the loaded adapters.
    """

    def __init__(self, room: AdapterRoom):
        self.room = room
        self.arrays: AdapterArrays | None = None
        self.listed: dict[str, str] = {}
        self._lora: Lora
        self._config: ModelConfig
        self._put: Callable[..., AdapterArrays]
        self._by_name: dict[str, Adapter] = {}
        self._free = list(range(room.count - 1, -1, -1))

    def prepare(self, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Make the arrays for a model.

        Args:
          config: the model.
          mesh: of the engine; None: one device.

        Raises:
          ValueError: the room's targets are not in the model.
        """
        self._config = config
        if self.room.count:
            self._lora = self.room.lora(config)
            shapes = adapter_shapes(config, self._lora)
            nothing = unstack_layers(_pad({"layers": {}}, shapes), config)["layers"]
            # Compiles both programs now, not when an adapter is loaded.
            empty = _empty(config, self._lora, self.room.count, mesh)
            places = jax.tree.map(lambda array: array.sharding, empty)
            self._put = jax.jit(_put, donate_argnums=0, out_shardings=places)
            arrays = self._put(empty, nothing, 0, 0.0)
            jax.block_until_ready(_get(arrays["layers"], 0))
            self.arrays = arrays

    def load(self, name: str, path: str, adapters: HostAdapters) -> None:
        """Put adapters into a free slot.

        Raises:
          ValueError: there is no room for them, or the name is taken.
        """
        self._require_room(name, adapters.lora)
        slot = self._free.pop()
        shapes = adapter_shapes(self._config, self._lora)
        stacked = _pad(adapters.stacked(self._config), shapes)
        padded = unstack_layers(stacked, self._config)["layers"]
        assert self.arrays is not None
        self.arrays = self._put(self.arrays, padded, slot, adapters.lora.scale)
        self._by_name[name] = Adapter(name, path, adapters.lora, slot)
        self._list()

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that have it go on.

        Raises:
          ValueError: none has this name.
        """
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise ValueError(self._unknown(name))
        adapter.is_loaded = False
        self._free_unused(adapter)
        self._list()

    def take(self, name: str) -> Adapter:
        """Return the adapter with a name, used by one more request.

        Raises:
          ValueError: none has this name.
        """
        adapter = self._by_name.get(name)
        if adapter is None:
            raise ValueError(self._unknown(name))
        adapter.users += 1
        return adapter

    def give_back(self, adapter: Adapter) -> None:
        """Count one request less for an adapter."""
        adapter.users -= 1
        self._free_unused(adapter)

    def checksums(self, name: str) -> dict[str, str]:
        """Return SHA-256 of every tensor of a loaded adapter, by the name that it has in PEFT.

        The bytes are those of float32 tensors, read from the device.

        Raises:
          ValueError: none has this name.
        """
        adapter = self._by_name.get(name)
        if adapter is None:
            raise ValueError(self._unknown(name))
        assert self.arrays is not None
        layers = jax.device_get(_get(self.arrays["layers"], adapter.slot))
        stacked = _cut(stack_layers({"layers": layers}), adapter.lora.rank)
        own = HostAdapters.of(stacked, self._config, adapter.lora)
        sums = {}
        for tensor, pair in own.pairs.items():
            for stored, array in zip(tensor_names(tensor), pair, strict=True):
                sums[stored] = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return sums

    def _require_room(self, name: str, lora: Lora) -> None:
        if not self.room.count:
            raise ValueError(
                "this engine has no room for adapters; start it with --max_loaded_loras"
            )
        if name in self._by_name:
            raise ValueError(
                f"an adapter {name!r} is loaded; unload it first, or give another name"
            )
        if lora.rank > self.room.rank:
            raise ValueError(
                f"rank {lora.rank} exceeds {self.room.rank}; start the engine with"
                f" --max_lora_rank {lora.rank}"
            )
        beyond = [target for target in lora.targets if target not in self._lora.targets]
        if beyond:
            words = ", ".join(dict.fromkeys(MATRICES[target].word for target in beyond))
            raise ValueError(
                f"it adapts {words} too, for which there is no room; start the engine with a larger"
                f" --lora_target_modules than {self.room.targets!r}"
            )
        if not self._free:
            raise ValueError(
                f"all {self.room.count} slots for adapters are used; unload one, wait for its"
                " requests, or start the engine with a larger --max_loaded_loras"
            )

    def _free_unused(self, adapter: Adapter) -> None:
        if not adapter.is_loaded and not adapter.users:
            self._free.append(adapter.slot)

    def _unknown(self, name: str) -> str:
        loaded = ", ".join(map(repr, self._by_name)) or "none"
        return f"no adapter {name!r} is loaded ({loaded}); load it by /load_lora_adapter"

    def _list(self) -> None:
        self.listed = {name: adapter.path for name, adapter in self._by_name.items()}


def with_adapters(params: Params, arrays: AdapterArrays | None, slot_T: Array) -> Params:
    """Return the parameters of a call: the base, and beside it the adapters of its tokens."""
    if arrays is None:
        return params
    layers = []
    for layer, adapters in zip(params["layers"], arrays["layers"], strict=True):
        own = dict(layer)
        for group, pairs in adapters.items():
            served = {
                name.removesuffix(SUFFIX) + SERVED: Served(
                    pair["a"], pair["b"], slot_T, arrays["scale"]
                )
                for name, pair in pairs.items()
            }
            own[group] = own[group] | served
        layers.append(own)
    return params | {"layers": tuple(layers)}


def read_adapters(path: str, config: ModelConfig) -> HostAdapters:
    """Return the adapters of a model in a directory that PEFT wrote.

    Raises:
      ValueError, OSError: it does not hold adapters of this model, or numbers that are not finite.
    """
    adapters = load_peft(pathlib.Path(path), config)
    adapters.require_finite(path)
    return adapters


# -- arrays
# -------------------------------------------------------------------------------------------------


def _empty(config: ModelConfig, lora: Lora, count: int, mesh: Mesh | None) -> AdapterArrays:
    """Return zeros for all slots; on a mesh those of experts lie where their experts do."""

    def one() -> Any:
        stacked = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), adapter_shapes(config, lora))
        return unstack_layers(stacked, config)["layers"]

    def zeros(path: tuple[Any, ...], one: Any) -> Array:
        _, group, name, which = path
        is_expert = group.key == "moe"
        spec = PartitionSpec()
        if is_expert:
            spec = ADAPTER_SPECS[name.key.removesuffix(SUFFIX)][which.key == "b"]
        place = None if mesh is None else NamedSharding(mesh, spec)
        shape = _shape(is_expert, which.key == "b", one.shape, count)
        return jnp.zeros(shape, jnp.float32, device=place)

    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return {
        "scale": jnp.zeros(count, jnp.float32, device=everywhere),
        "layers": jax.tree_util.tree_map_with_path(zeros, jax.eval_shape(one)),
    }


def _shape(is_expert: bool, is_b: bool, one: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the shape of an array of all slots, from that of one adapter's."""
    if is_expert:
        return (count, *one)
    if is_b:
        return (count, one[0], math.prod(one[1:]))
    return (math.prod(one[:-1]), count, one[-1])


def _put(arrays: AdapterArrays, one: Any, slot: int, scale: float) -> AdapterArrays:
    """Return the arrays with one adapter in a slot."""

    def put(is_expert: bool, is_b: bool, stack: Array, own: Array) -> Array:
        if is_expert:
            return stack.at[slot].set(own)
        if is_b:
            return stack.at[slot].set(own.reshape(stack.shape[1:]))
        return stack.at[:, slot].set(own.reshape(stack.shape[0], -1))

    return {
        "scale": arrays["scale"].at[slot].set(scale),
        "layers": _map(put, arrays["layers"], one),
    }


@jax.jit
def _get(layers: Any, slot: int) -> Any:
    """Return one adapter of all slots, its inputs and outputs an axis each."""

    def get(is_expert: bool, is_b: bool, stack: Array) -> Array:
        return stack[slot] if is_expert or is_b else stack[:, slot]

    return _map(get, layers)


def _map(function: Callable[..., Array], layers: Any, *others: Any) -> Any:
    """Return function(whether of experts, whether B, arrays ...) of every array of the layers."""

    def apply(path: tuple[Any, ...], *arrays: Any) -> Array:
        _, group, _, which = path
        return function(group.key == "moe", which.key == "b", *arrays)

    return jax.tree_util.tree_map_with_path(apply, layers, *others)


def _pad(adapters: Any, shapes: Any) -> Any:
    """Return stacked adapters as large as `shapes`: zeros beyond their rank and matrices."""

    def pad(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        padded = np.zeros(shape.shape, np.float32)
        _, group, name, which = (key.key for key in path)
        pair = adapters["layers"].get(group, {}).get(name)
        if pair is not None:
            axis = _rank_axis(path) % padded.ndim
            rank = pair[which].shape[axis]
            padded[(slice(None),) * axis + (slice(rank),)] = pair[which]
        return padded

    return jax.tree_util.tree_map_with_path(pad, shapes)


def _cut(adapters: Any, rank: int) -> Any:
    """Return the stacked adapters without what `_pad` added."""

    def cut(path: tuple[Any, ...], array: np.ndarray) -> np.ndarray:
        return np.take(array, np.arange(rank), axis=_rank_axis(path))

    return jax.tree_util.tree_map_with_path(cut, adapters)


def _rank_axis(path: tuple[Any, ...]) -> int:
    """Return the axis of the rank in a stacked array of adapters."""
    _, group, _, which = (key.key for key in path)
    if which == "a":
        return -1
    return 2 if group == "moe" else 1
