"""Fixtures that several test files of this folder share, one engine for all."""

from tests.envs.rock.engine import engine

__all__ = ["engine"]
