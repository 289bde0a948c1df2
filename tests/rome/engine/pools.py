"""What the tests of pools share: publications to fake servers, supervision, and the rule that every
token comes from the weights that its span names.
"""

import asyncio
import contextlib

from rome.engine.publish import publish_weights
from rome.engine.supervise import supervise
from tests.rome.engine.fake_sglang import logprobs_of, make_weights, trainer_logprobs_of

PROBE = list(range(20, 276))
TOLERANCE = 0.1  # of bfloat16
PROMPT = [5, 6, 7]


def run(conversation, seconds=30):
    asyncio.run(asyncio.wait_for(conversation, seconds))


async def bring(pool, tmp_path, version, value=None, **options):
    value = version if value is None else value
    path = make_weights(tmp_path / f"step_{version}", value)
    expected = trainer_logprobs_of(value, PROBE)
    return await publish_weights(path, version, pool, PROBE, expected, TOLERANCE, **options)


@contextlib.asynccontextmanager
async def supervised(pool, interval_seconds=0.05, probe_seconds=3.0):
    task = asyncio.create_task(
        supervise(pool, interval_seconds=interval_seconds, probe_seconds=probe_seconds)
    )
    await asyncio.sleep(0)
    try:
        yield
    finally:
        assert not task.done()  # it never ends by itself
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(claim, seconds=60.0):
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(0.01)


def assert_by_one_version_each(completion, prompt, value_of=lambda version: version or 1):
    """Every token and its logprob come from the weights that its span names: no stale cache, no
    stale weights, nothing lost.
    """
    places = [place for _, start, end in completion.versions for place in range(start, end)]
    assert places == list(range(len(completion.output_ids)))
    for version, start, end in completion.versions:
        for place in range(start, end):
            value, token = value_of(version), completion.output_ids[place]
            assert token == value % 1000 + len(prompt) + place
            assert (
                completion.logprobs[place]
                == logprobs_of(value, (prompt + completion.output_ids)[: len(prompt) + place + 1])[
                    -1
                ]
            )
