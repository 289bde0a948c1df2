"""Waits of the stages for the background event loop; each says what it waited for."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TypeVar

from envs.rock.sync import run
from rome.engine.errors import EngineError
from rome.rollout.episode import RolloutError

T = TypeVar("T")


def wait_for_episodes(coroutine: Coroutine[object, object, T], seconds: float, what: str) -> T:
    """Run a coroutine about episodes on the background event loop and return its result.

    Args:
      coroutine: what to run; cancelled after `seconds`.
      seconds: more than it takes unless something hangs.
      what: subject of the message, such as "the evaluation of 40 episodes".

    Raises:
      RolloutError: it did not end in time.
    """
    try:
        return run(coroutine, seconds, what)
    except TimeoutError as error:
        raise RolloutError(
            f"{error}: a sandbox or an engine hangs; see its log. Finished trajectories are kept;"
            " run the same command again."
        ) from error


def wait_for_engines(coroutine: Coroutine[object, object, T], seconds: float, what: str) -> T:
    """Run a coroutine about engines as `wait_for_episodes` does.

    Raises:
      EngineError: it did not end in time.
    """
    try:
        return run(coroutine, seconds, what)
    except TimeoutError as error:
        raise EngineError(
            f"{error}: an engine hangs; see its log, start it again and run the same command again"
        ) from error
