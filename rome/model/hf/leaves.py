"""A checkpoint read one parameter after the other, with layers that are not stacked: for engines.

Every parameter of every layer goes straight to its devices, in blocks, on several threads. So an
engine holds one copy of its weights while it loads, and the host some hundred megabytes. Weights
that are replaced make room one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rome.model.config import ModelConfig
from rome.model.hf.assemble import Read, reads_of, sharded_array
from rome.model.hf.checkpoint import open_checkpoint, read_config
from rome.model.hf.files import in_threads
from rome.model.hf.names import Tensor, checkpoint_tensors, leaf_at
from rome.model.params import engine_sharding, parameter_shapes
from rome.model.stacking import Params


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of one layer, or one outside of the layers.

    Attributes:
      path: keys in the stacked pytree.
      layer: number of the layer; None outside of them.
      shape: of the parameter.
      tensors: of the checkpoint that it is made of, as slices of it.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """The name of the parameter, as in `rome.model.params.PARAM_AXES`."""
        return "/".join(self.path)

    def in_tree(self, params: Params) -> dict[str, Any]:
        """Return the dictionary of an unstacked pytree that holds this parameter."""
        node: Any = params
        keys = self.path[:-1]
        if self.layer is not None:
            node = params["layers"][self.layer]
            keys = self.path[1:-1]
        for key in keys:
            node = node.setdefault(key, {})
        return node


class LeafReader:
    """A checkpoint that is open; a context manager.

    Its files stay readable if the directory is removed meanwhile.

    Args:
      directory: the checkpoint.
      dtype: of the parameters.

    Attributes:
      config: of the model.

    Raises:
      FileNotFoundError: the checkpoint or a file of it is missing.
      ValueError: a file is damaged, or tensors are missing, unknown or mis-shaped, all of which one
        error lists.
    """

    def __init__(self, directory: str | pathlib.Path, dtype: str) -> None:
        self.directory = pathlib.Path(directory)
        self.config = read_config(self.directory, dtype=dtype, remat="none")
        self._dtype = np.dtype(jnp.dtype(dtype))
        self._reader = open_checkpoint(self.directory, self.config)
        self._reader.__enter__()

    def __enter__(self) -> LeafReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._reader.__exit__()

    def read_all(self, place: Mesh | jax.Device, old: Params | None = None) -> Params:
        """Return the parameters, layers unstacked.

        Args:
          place: the engine's mesh, or its one device.
          old: parameters of the same model that these replace. Each is deleted before the one that
            takes its place is read, so nothing of them is left even where this fails.

        Raises:
          ValueError, OSError: a file ends too early or cannot be read, or a number is not finite.
            The message is one sentence.
        """
        params: Params = {"layers": tuple({} for _ in range(self.config.num_layers))}
        try:
            for leaf in leaves(self.config):
                if old is not None:
                    leaf.in_tree(old)[leaf.path[-1]].delete()
                leaf.in_tree(params)[leaf.path[-1]] = self._read(leaf, place)
        except BaseException:
            for array in jax.tree.leaves(old):
                array.delete()
            raise
        return params

    def _read(self, leaf: Leaf, place: Mesh | jax.Device) -> jax.Array:
        sharding = engine_sharding(place, leaf.name)
        partial = sharded_array(leaf.tensors[0], leaf.shape, self._dtype, sharding)
        reader = self._reader

        def run(job: Read) -> None:
            each = job.tensor.rows_each
            block = reader.read(job.tensor.name, job.start * each, job.stop * each)
            for part in job.parts:
                part.write(job.tensor, job.start, job.stop, block)

        in_threads(run, reads_of(((tensor, partial) for tensor in leaf.tensors), reader))
        array = partial.result()
        if not _is_finite(array):
            layer = "" if leaf.layer is None else f" of layer {leaf.layer}"
            raise ValueError(
                f"{self.directory}: {leaf.name}{layer} is not finite; publish the weights again"
            )
        return array


@functools.lru_cache(maxsize=4)
def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """Return every parameter of a model, layer by layer."""
    shapes = parameter_shapes(config)
    found = []

    def place(tensor: Tensor) -> tuple[int, tuple[str, ...]]:
        return (-1 if tensor.layer is None else tensor.layer), tensor.path

    in_order = sorted(checkpoint_tensors(config), key=place)
    for _, group in itertools.groupby(in_order, place):
        tensors = list(group)
        path = tensors[0].path
        layer = tensors[0].layer
        shape = tuple(leaf_at(shapes, path).shape)
        if layer is not None:
            shape = shape[1:]
            tensors = [dataclasses.replace(one, index=one.index[1:]) for one in tensors]
        found.append(Leaf(path, layer, shape, tuple(tensors)))
    return tuple(found)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _is_finite(array: Any) -> bool:
    return bool(_all_finite(array))
