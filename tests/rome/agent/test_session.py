"""A session owns the ids of an episode: calls overlap, branch and fail, and each is recorded in the
context that it was sampled in. Seeds follow from contexts, not from the order of arrival.
"""

import asyncio
import random

import numpy as np
import pytest

from rome.agent.session import ContextFull, Session, SessionError, TruncatedParent
from rome.data.trajectory import Chunk, Trajectory
from rome.data.tree import LAST, ROOT
from rome.engine.completion import Completion
from rome.engine.errors import EngineError, EngineFailed
from tests.rome.rollout.worlds import CHAT, routes_of

TOKENIZER = CHAT.tokenizer


class Engine:
    """Answers with tokens that its seed draws, after a delay that `delays` draws."""

    def __init__(self, delays=None, finish_reason="stop", error=None, versions=None):
        self.delays, self.finish_reason = delays, finish_reason
        self.error, self.versions = error, versions
        self.requests = []

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None):
        self.requests.append((list(input_ids), sampling))
        if self.delays is not None:
            await asyncio.sleep(self.delays.random() / 50)
        if self.error is not None:
            raise self.error
        drawn = random.Random(f"{sampling.seed} {input_ids}")
        ids = [drawn.randrange(10, 200) for _ in range(min(3, sampling.max_new_tokens))]
        ids = [*ids[:-1], TOKENIZER.im_end]
        routes = None
        if sampling.routes_from is not None:
            routes = routes_of([*input_ids, *ids])[sampling.routes_from : -1]
        versions = [(2, 0, 1), (3, 1, len(ids))] if self.versions is None else self.versions
        return Completion(ids, [-0.5] * len(ids), self.finish_reason, versions, routes=routes)


def session(engine, **options):
    return Session(
        engine,
        TOKENIZER,
        **{"seed": 7, "max_context": 100, "max_new_tokens": 8, "completion_seconds": 5.0} | options,
    )


async def family(engine, **options):
    """Play three turns, and beside the last two of them eight sub-agents of two turns at once."""
    one = session(engine, **options)
    first = await one.sample(ROOT, [1, 2])

    async def subagent(number):
        opened = await one.sample(ROOT, [5, number % 6], edge="subagent")  # some have one task
        await one.sample(opened, [6])

    async def main():
        second = await one.sample(first, [3])
        await one.sample(second, [4])

    await asyncio.gather(main(), *(subagent(number) for number in range(8)))
    return one


def lines_of(one):
    """The (prompt, actions) along each line, whatever the order of the chunks."""
    trajectory = Trajectory("t", "f", one.chunks, 1.0, "success")
    return sorted(
        [(one.chunks[n].prompt_ids, one.chunks[n].action_ids) for n in line]
        for line in trajectory.lines()
    )


def test_what_is_sampled_does_not_depend_on_the_order_of_arrival():
    played = [asyncio.run(family(Engine(random.Random(seed)))) for seed in range(4)]
    orders = [[chunk.prompt_ids for chunk in one.chunks] for one in played]
    assert orders[0] != orders[1], "the calls did not overlap"
    assert all(lines_of(one) == lines_of(played[0]) for one in played[1:])
    seeds = [sorted(sampling.seed for _, sampling in one._engine.requests) for one in played]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0])) == len(seeds[0]) == 19


def test_equal_contexts_are_sampled_anew_and_another_episode_elsewhere():
    async def ask(seed):
        one = session(Engine(), seed=seed)
        await asyncio.gather(*(one.sample(ROOT, [1, 2]) for _ in range(3)))
        return [sampling.seed for _, sampling in one._engine.requests]

    seeds = asyncio.run(ask(7))
    assert len(set(seeds)) == 3 and asyncio.run(ask(7)) == seeds
    assert not set(seeds) & set(asyncio.run(ask(8)))


def test_the_engine_is_sent_the_whole_context_of_the_branch():
    one = asyncio.run(family(Engine(random.Random(1))))
    trajectory = Trajectory("t", "f", one.chunks, 1.0, "success")
    sent = sorted(ids for ids, _ in one._engine.requests)
    contexts = []
    for number, chunk in enumerate(trajectory.chunks):
        context = one.context_of(number)
        assert context[len(context) - len(chunk.action_ids) :] == chunk.action_ids
        contexts.append(context[: -len(chunk.action_ids)])
        assert chunk.versions == [(2, 0, 1), (3, 1, 3)]
    assert sorted(contexts) == sent
    assert (
        trajectory.chunks[0].parent == LAST and sum(c.edge == "subagent" for c in one.chunks) == 8
    )


def test_each_token_has_the_route_of_the_call_that_ran_it_first_in_every_branch():
    one = asyncio.run(family(Engine(random.Random(3)), routes=True))
    trajectory = Trajectory("t", "f", one.chunks, 1.0, "success")
    for line in trajectory.lines():
        ids = one.context_of(line[-1])
        routes = np.concatenate([one.chunks[number].routes for number in line])
        np.testing.assert_array_equal(routes[:-1], routes_of(ids)[:-1])
        assert not routes[-1].any()


def test_a_second_branch_leaves_the_route_that_the_first_one_brought():
    async def fork():
        one = session(Engine(), routes=True)
        first = await one.sample(ROOT, [1, 2])
        await one.sample(first, [3])
        kept = one.chunks[first].routes.copy()
        assert kept[-1].any()
        one.chunks[first].routes[-1] = 9  # as if the second pass chose others
        await one.sample(first, [4], edge="rewind")
        return one.chunks[first].routes, kept

    routes, kept = asyncio.run(fork())
    assert (routes[-1] == 9).all() and (routes[:-1] == kept[:-1]).all()


def test_a_replayed_prefix_is_gone_on_from_and_its_routes_are_not_asked_for():
    prefix = [Chunk([1], [2, 3], [0.0, 0.0], kind="context")]
    engine = Engine()
    one = session(engine, routes=True, chunks=prefix)
    number = asyncio.run(one.sample(one.last, [4]))
    assert number == 1 and engine.requests[0][0] == [1, 2, 3, 4]
    assert engine.requests[0][1].routes_from == 3 and prefix[1].parent == LAST


def test_a_full_context_is_refused_before_the_engine_is_asked():
    engine = Engine()
    one = session(engine, max_context=4)
    with pytest.raises(ContextFull, match="no room left in a context of 4 tokens"):
        asyncio.run(one.sample(ROOT, [1, 2, 3, 4]))
    assert not engine.requests and not one.chunks
    asyncio.run(one.sample(ROOT, [1, 2, 3]))
    assert engine.requests[0][1].max_new_tokens == 1


def test_limits_of_a_call_are_within_those_of_the_session():
    engine = Engine()
    one = session(engine)
    for wanted, given in ((None, 8), (3, 3), (50, 8)):
        asyncio.run(one.sample(ROOT, [1], max_new_tokens=wanted, temperature=0.5))
        sampling = engine.requests[-1][1]
        assert (sampling.max_new_tokens, sampling.temperature) == (given, 0.5)
    with pytest.raises(SessionError, match="max_new_tokens is 0"):
        asyncio.run(one.sample(ROOT, [1], max_new_tokens=0))


def test_nothing_follows_an_answer_that_was_cut():
    one = session(Engine(finish_reason="length"))
    number = asyncio.run(one.sample(ROOT, [1]))
    assert one.is_truncated(number) and one.chunks[number].status == "malformed"
    with pytest.raises(TruncatedParent, match="chunk 0 was cut"):
        asyncio.run(one.sample(number, [2]))


@pytest.mark.parametrize("parent", [0, 1, -1, -3])
def test_a_parent_that_is_not_there_is_refused(parent):
    with pytest.raises(SessionError, match=f"parent {parent} is no chunk"):
        asyncio.run(session(Engine()).sample(parent, [1]))


@pytest.mark.parametrize("edge", ["return", "rewind"])
def test_an_edge_that_leads_nowhere_is_refused_before_the_engine_is_asked(edge):
    one = session(Engine())
    with pytest.raises(SessionError, match=f"edge '{edge}' does not lead"):
        asyncio.run(one.sample(ROOT, [1], edge=edge))
    assert not one._engine.requests


def test_an_empty_context_is_refused():
    with pytest.raises(SessionError, match="needs a token to begin with"):
        asyncio.run(session(Engine()).sample(ROOT, []))


@pytest.mark.parametrize("versions", [[], [(1, 0, 2)], [(1, 1, 3)], [(1, 0, 1), (2, 2, 3)]])
def test_versions_that_do_not_cover_the_answer_are_the_engines_fault(versions):
    one = session(Engine(versions=versions))
    with pytest.raises(EngineFailed, match="must cover the tokens in order"):
        asyncio.run(one.sample(ROOT, [1]))
    assert not one.chunks


def test_answers_of_another_model_are_recorded_as_context():
    one = session(Engine(versions=[]), kind="context")
    number = asyncio.run(one.sample(ROOT, [1]))
    assert one.chunks[number].kind == "context" and one.chunks[number].versions == []
    with pytest.raises(EngineFailed):
        asyncio.run(session(Engine(versions=[(1, 0, 1)]), kind="context").sample(ROOT, [1]))


def test_a_call_that_fails_leaves_nothing_in_the_record():
    one = session(Engine(error=EngineError("gone")))
    with pytest.raises(EngineError, match="gone"):
        asyncio.run(one.sample(ROOT, [1]))
    assert one.chunks == [] and one.last == ROOT
