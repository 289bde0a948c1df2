"""Fixtures that several test files of this folder share, one engine for all.

Files about another backend have an `inside` of their own.
"""

from tests.envs.rock.engine import engine
from tests.envs.rock.in_docker import inside

__all__ = ["engine", "inside"]
