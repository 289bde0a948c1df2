"""The families of the terminal curriculum. Importing this package registers all of them."""

from envs.tasks.terminal.families import base, held_out, wide

__all__ = ["base", "held_out", "wide"]
