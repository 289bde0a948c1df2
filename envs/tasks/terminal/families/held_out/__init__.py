"""Families that are never trained on. Importing this package registers them."""

from envs.tasks.terminal.families.held_out import unseen

__all__ = ["unseen"]
