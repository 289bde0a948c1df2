"""The reward that own code gives an episode: what training learns from (config.reward)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

from rome.data.trajectory import Trajectory
from rome.rollout.episode import RolloutError

Reward = Callable[[Trajectory], float]
REWARD_SECONDS = 120.0  # for one answer of it


async def ask(reward: Reward, trajectory: Trajectory) -> float:
    """Return what own code gives an episode.

    It runs in a thread, since it may ask a judge somewhere; one that hangs does not keep the
    process from ending.

    Raises:
      RolloutError: it takes longer than REWARD_SECONDS. What it raises itself is raised as it is.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[float] = loop.create_future()

    def tell(value: float | None, error: Exception | None) -> None:
        if answer.done():  # too late, or the episode was cancelled
            return
        if error is not None:
            answer.set_exception(error)
        elif value is not None:
            answer.set_result(value)

    def work() -> None:
        value, failure = None, None
        try:
            value = reward(trajectory)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, value, failure)

    threading.Thread(target=work, name="own reward", daemon=True).start()
    try:
        return await asyncio.wait_for(answer, REWARD_SECONDS)
    except TimeoutError:
        raise RolloutError(
            f"the reward of own code took longer than {REWARD_SECONDS:.0f} s for an episode of"
            f" {trajectory.task}. Give its requests a deadline of their own"
        ) from None
