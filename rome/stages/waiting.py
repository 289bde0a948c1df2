"""Waits of the stages for the background event loop; each says what it waited for.

A wait that is given `should_stop` ends by Stopped when the user asks to stop. Waits that save or
close what is there are given none: they only have their deadline.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from envs.rock.sync import run
from rome.engine.errors import EngineError
from rome.rollout.episode import RolloutError
from rome.stopping import ShouldStop, until_stopped

T = TypeVar("T")


def wait_for_episodes(
    coroutine: Coroutine[Any, Any, T],
    seconds: float,
    what: str,
    should_stop: ShouldStop | None = None,
) -> T:
    """Run a coroutine about episodes on the background event loop and return its result.

    Args:
      coroutine: what to run; cancelled after `seconds`.
      seconds: more than it takes unless something hangs.
      what: subject of the message, such as "the evaluation of 40 episodes".
      should_stop: whether the user asked to stop.

    Raises:
      RolloutError: it did not end in time.
      Stopped: the user asked to stop.
    """
    try:
        return _wait(coroutine, seconds, what, should_stop)
    except TimeoutError as error:
        raise RolloutError(
            f"{error}: a sandbox or an engine hangs; see its log. Finished trajectories are kept;"
            " run the same command again."
        ) from error


def wait_for_engines(
    coroutine: Coroutine[Any, Any, T],
    seconds: float,
    what: str,
    should_stop: ShouldStop | None = None,
) -> T:
    """Run a coroutine about engines as `wait_for_episodes` does.

    Raises:
      EngineError: it did not end in time.
      Stopped: the user asked to stop.
    """
    try:
        return _wait(coroutine, seconds, what, should_stop)
    except TimeoutError as error:
        raise EngineError(
            f"{error}: an engine hangs; see its log, start it again and run the same command again"
        ) from error


def _wait(
    coroutine: Coroutine[Any, Any, T], seconds: float, what: str, should_stop: ShouldStop | None
) -> T:
    if should_stop is None:
        return run(coroutine, seconds, what)
    return run(until_stopped(coroutine, should_stop), seconds, what)
