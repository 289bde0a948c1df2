"""A wait that ends by its deadline says what it waited for."""

import asyncio

import pytest

from envs.rock.sync import run
from rome.engine.errors import EngineError
from rome.rollout.episode import RolloutError
from rome.stages.waiting import wait_for_engines, wait_for_episodes


async def hang():
    await asyncio.sleep(60)


async def time_out_in_silence():
    async with asyncio.timeout(0.01):
        await asyncio.sleep(60)


async def time_out_with_words():
    raise TimeoutError("the door did not open within 3 s")


@pytest.mark.parametrize(
    "coroutine, what, message",
    [
        (hang, "the evaluation", "the evaluation did not end within 0.05 s"),
        (hang, "", "hang did not end within 0.05 s"),
        (time_out_in_silence, "the evaluation", "the evaluation"),
        (time_out_in_silence, "", "time_out_in_silence"),
        (time_out_with_words, "the evaluation", "the door did not open within 3 s"),
    ],
)
@pytest.mark.parametrize(
    "wait, kind",
    [
        (run, TimeoutError),
        (wait_for_episodes, RolloutError),
        (wait_for_engines, EngineError),
    ],
)
def test_a_deadline_names_what_did_not_end(wait, kind, coroutine, what, message):
    with pytest.raises(kind, match=f"^{message}"):
        wait(coroutine(), 0.05, what)


def test_an_error_of_a_deadline_says_what_to_do():
    with pytest.raises(RolloutError, match="run the same command again"):
        wait_for_episodes(hang(), 0.01, "the check")
    with pytest.raises(EngineError, match="see its log"):
        wait_for_engines(hang(), 0.01, "the publication of weights 3")
