"""Answers of an unexpected shape are the failure of the engine that gave them."""

import asyncio
import contextlib
import copy
import json

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.engine.answers import parse_answer
from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.errors import EngineError, EngineFailed, RequestRejected
from tests.rome.engine.pools import PROMPT, run

GOOD = {
    "text": "",
    "output_ids": [11, 12, 13],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 3},
        "weight_version": "4",
        "weight_versions": [
            {"version": "default", "start": 0, "end": 1},
            {"version": "4", "start": 1, "end": 3},
        ],
        "cached_tokens": 0,
        "output_token_logprobs": [[-0.5, 11, None], [-0.25, 12, None], [-1.0, 13, None]],
    },
}


def places(value, path=()):
    """Yield the path of every value inside a JSON document."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from places(item, (*path, key))


PLACES = sorted(places(GOOD), key=str)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers() | st.none(), max_size=3),
    st.dictionaries(st.sampled_from(["type", "start", "end", "version"]), st.none(), max_size=2),
    st.just("<html>502 Bad Gateway</html>"),
    st.just(10**400),
)


def mutated(path, junk, remove):
    """Return the good answer with the value at `path` replaced, or removed from what holds it."""
    if not path:
        return junk
    answer = copy.deepcopy(GOOD)
    holder = answer
    for key in path[:-1]:
        holder = holder[key]
    if remove:
        del holder[path[-1]]
    else:
        holder[path[-1]] = junk
    return answer


@pytest.mark.long
@settings(max_examples=1000)
@given(path=st.sampled_from(PLACES), junk=JUNK, remove=st.booleans())
def test_any_mutation_of_an_answer_is_the_engines_failure_or_a_whole_answer(path, junk, remove):
    answer = mutated(path, junk, remove)
    try:
        parsed = parse_answer("http://a:1", answer, None, max_tokens=3)
    except EngineFailed as error:
        assert "http://a:1" in str(error)
        return
    assert len(parsed.ids) == len(parsed.logprobs) <= 3
    assert all(-1e9 < logprob < 1e9 or path[-1] == 0 for logprob in parsed.logprobs)
    covered = [place for span in parsed.spans for place in range(span.start, span.end)]
    assert covered == list(range(len(parsed.ids)))
    assert parsed.finish_reason in ("stop", "length", "abort")


def test_the_unmutated_answer_is_read():
    parsed = parse_answer("http://a:1", GOOD, None, max_tokens=3)
    assert parsed.ids == [11, 12, 13] and parsed.logprobs == [-0.5, -0.25, -1.0]
    assert [(span.version, span.start, span.end) for span in parsed.spans] == [(0, 0, 1), (4, 1, 3)]


@contextlib.asynccontextmanager
async def answering(text, content_type="application/json", status=200):
    """A server that answers everything with one text."""

    async def handle(_):
        return web.Response(text=text, content_type=content_type, status=status)

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        async with Engine(f"http://127.0.0.1:{port}", dead_after_seconds=0.2) as engine:
            yield engine
    finally:
        await runner.cleanup()


WRONG_TEXTS = [
    ("<html>502 Bad Gateway</html>", "text/html"),
    ("[]", "application/json"),
    ("null", "application/json"),
    ("{}", "application/json"),
    ("", "application/json"),
    ("{", "application/json"),
    ("[" * 100_000, "application/json"),
    (json.dumps([GOOD]), "application/json"),
    (json.dumps(GOOD).replace("-0.25", "null"), "application/json"),
    (json.dumps(GOOD).replace("-0.25", "NaN"), "application/json"),
    (json.dumps(GOOD).replace("-0.25", "-Infinity"), "application/json"),
    (json.dumps(GOOD).replace("[11, 12, 13]", "null"), "application/json"),
]


@pytest.mark.parametrize("text, content_type", WRONG_TEXTS)
def test_a_wrong_answer_is_the_engines_failure_whatever_is_asked(text, content_type):
    async def conversation():
        async with answering(text, content_type) as engine:
            asks = [
                engine.generate(PROMPT, Sampling(3), 10),
                engine.score(PROMPT),
                engine.update_weights("/weights", 1),
                engine.dialect(),
            ]
            for answer in await asyncio.gather(*asks, return_exceptions=True):
                assert isinstance(answer, EngineError) and engine.url in str(answer), answer

    run(conversation())


@pytest.mark.parametrize("status, kind", [(500, EngineFailed), (400, RequestRejected)])
def test_an_error_status_says_whether_the_engine_or_the_request_is_wrong(status, kind):
    async def conversation():
        async with answering('{"error": {"message": "no"}}', status=status) as engine:
            with pytest.raises(kind, match=f"answered {status}: no"):
                await engine.generate(PROMPT, Sampling(3), 10)

    run(conversation())
