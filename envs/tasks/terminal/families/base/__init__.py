"""Families that the tiny model trains on. Importing this package registers them."""

from envs.tasks.terminal.families.base import files, notes, numbers, scripts, text

__all__ = ["files", "notes", "numbers", "scripts", "text"]
