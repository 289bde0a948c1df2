"""Checkpoints of a stage: the training state, and a JSON document of the state on the host.

A checkpoint is either whole or absent: orbax writes to a temporary directory and renames it. Saving
is asynchronous; `close` waits for the last one.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from rome.train.state import TrainState

MAX_REASON = 200  # characters of an error that a message quotes
LARGE_BYTES = 64 * 1024**2  # arrays above this are stored layer by layer


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read: the message has its path and the remedy."""


class Checkpoints:
    """The numbered checkpoints of one directory.

    Args:
      directory: made where it does not exist.
      keep: how many of the newest checkpoints stay.
    """

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that exist."""
        return list(self._manager.all_steps())

    def oldest_on_disk(self) -> int | None:
        """Return the step of the oldest checkpoint that is whole; None where there is none.

        `steps` also counts the one that is being written.
        """
        names = (path.name for path in self.directory.iterdir())
        return min((int(name) for name in names if name.isdigit()), default=None)

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Start to write a checkpoint; return once the device arrays may be reused.

        Saving the newest step again does nothing.

        Args:
          step: the number of the checkpoint.
          state: arrays on the devices.
          host: a JSON document.
        """
        if step == self._manager.latest_step():
            return
        arrays = ocp.args.StandardSave(state, save_args=save_options(state))
        document = ocp.args.JsonSave(host)
        self._manager.save(step, args=ocp.args.Composite(state=arrays, host=document))

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the state of a checkpoint and its host document.

        Args:
          like: arrays, or abstract ones, with the shapes and shardings to restore to.
          step: of the checkpoint; None: the newest.

        Raises:
          CheckpointError: where the files cannot be read.
        """
        step = self._manager.latest_step() if step is None else step
        path = self.directory / str(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arrays = ocp.args.StandardRestore(abstract)
        document = ocp.args.JsonRestore()
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=arrays, host=document)
            )
        except Exception as error:  # orbax raises many types for a torn file
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({first_line(error)}). Delete that folder to"
                " resume from the checkpoint before it."
            ) from error
        return restored["state"], restored["host"]

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last checkpoint and free the manager."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_options(state: Any) -> Any:
    """Return how each array is stored.

    A large stack of layers gets one chunk a layer and device, so that a layer can be read alone.
    """

    def options(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        is_stack_of_layers = any(getattr(key, "key", None) == "layers" for key in path)
        if is_stack_of_layers and leaf.nbytes > LARGE_BYTES:
            return ocp.SaveArgs(shard_axes=(0,))
        return ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(options, state)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else type(error).__name__
