"""Checkpoints of a stage (orbax): the training state, and a JSON document of everything else that a
resumed run must know.

A checkpoint is either whole or not there: orbax writes beside and renames. Saving is asynchronous;
`close` waits for the last one.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from rome.train.state import TrainState

LARGE_BYTES = 64 * 1024**2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, with its path and what to do."""


class Checkpoints:
    """The numbered checkpoints of one directory; the newest `keep` stay."""

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Of the checkpoints that are there."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Starts to write; returns once the device arrays may be reused.

        Saving a step twice does nothing.
        """
        if step != self._manager.latest_step():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state, save_args=save_options(state)),
                    host=ocp.args.JsonSave(host),
                ),
            )

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` (the newest by default) with the shapes and shardings of `like`, and
        its host document.
        """
        step = self._manager.latest_step() if step is None else step
        path = self.directory / str(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
                ),
            )
        except (
            Exception
        ) as error:  # orbax raises many kinds for torn files; each means the same to the user
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise CheckpointError(
                f"checkpoint {path} cannot be read ({reason[:200]}). Delete that folder to go on"
                " from the one before it."
            ) from error
        return restored["state"], restored["host"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def save_options(state: Any) -> Any:
    """How each array lies on disk: a large stack of layers in one chunk a layer and device, so that
    a layer can be read without the others.
    """

    def options(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        in_layers = any(getattr(key, "key", None) == "layers" for key in path)
        return (
            ocp.SaveArgs(shard_axes=(0,))
            if in_layers and leaf.nbytes > LARGE_BYTES
            else ocp.SaveArgs()
        )

    return jax.tree_util.tree_map_with_path(options, state)
