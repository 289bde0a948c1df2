"""Families for larger models, in six domains of terminal work.

Importing this package registers them.
"""

from envs.tasks.terminal.families.wide import data, debugging, files, git, software, system, text

__all__ = ["data", "debugging", "files", "git", "software", "system", "text"]
