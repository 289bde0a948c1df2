"""The SFT stream: complete epochs, one order for a seed, an exact position."""

import collections
import itertools
import json

import numpy as np
import pytest

from rome.data import sources
from rome.data.batch import IMITATION
from rome.data.sources import endless_order, sft_batches
from rome.data.trajectory import Chunk, Trajectory


@pytest.fixture(autouse=True, scope="module")
def few_open_rows():
    """Fill two rows at a time, so that streams come to their rhythm soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "ROWS_OPEN", 2)
        yield


@pytest.fixture(scope="module")
def experts():
    """Trajectory n has n in its first token."""
    rng = np.random.default_rng(0)
    return [
        Trajectory(f"t{n}", "f", [_chunk(n, rng.integers(1, 9))], 1.0, "success")
        for n in range(1, 14)
    ]


def _chunk(n, acted):
    return Chunk([n, 500], [501] * int(acted), [0.0] * int(acted))


def stream(trajectories, seed=0, rows=2, own=None):
    order = endless_order([(trajectories, 1.0)], seed)
    return sft_batches(order, rows=rows, row_length=24, chunks_per_row=4, own=own)


def first_tokens(batch):
    return batch.tokens_BT[(batch.positions_BT == 0) & (batch.segments_BT > 0)].tolist()


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_batches_have_one_shape_and_each_epoch_has_every_trajectory_once(experts):
    batches = take(stream(experts, rows=1), 40)
    assert {batch.tokens_BT.shape for batch in batches} == {(1, 24)}
    seen = [n for batch in batches for n in first_tokens(batch)]
    counts = collections.Counter(seen)
    assert set(counts) == set(range(1, 14)) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.long
def test_a_row_has_its_own_share_of_the_order_each_item_once(experts):
    batches = take(stream(experts, rows=3), 20)
    order = endless_order([(experts, 1.0)], seed=0)
    for row in range(3):
        seen = [n for batch in batches for n in first_tokens(batch.map(lambda f: f[[row]]))]  # noqa: B023
        due = [order[place].chunks[0].prompt_ids[0] for place in range(row, 600, 3)]
        open_rows = len(seen) - len(seen) % 13
        assert collections.Counter(seen[:open_rows]) == collections.Counter(due[:open_rows])


@pytest.mark.long
@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[3], [0, 2], [1]], [[0], [1], [2], [3]]])
def test_rows_do_not_depend_on_how_many_processes_read_them(experts, split):
    whole = take(stream(experts, rows=4), 12)
    streams = [stream(experts, rows=4, own=own) for own in split]
    for number in range(12):
        for own, part in zip(split, [next(one) for one in streams], strict=True):
            assert same(part.map(lambda f: f[own]), whole[number].map(lambda f: f[own]))  # noqa: B023
            others = [row for row in range(4) if row not in own]
            assert not part.tokens_BT[others].any() and not part.action_mask_BT[others].any()


@pytest.mark.long
@pytest.mark.parametrize("consumed", [1, 4, 9])
def test_a_position_of_some_processes_is_resumed_by_another_number_of_them(experts, consumed):
    position = {}
    for own in ([0, 3], [1, 2]):
        one = stream(experts, rows=4, own=own)
        take(one, consumed)
        position |= one.get_state()
    position = json.loads(json.dumps(position))
    whole = take(stream(experts, rows=4), consumed + 6)[consumed:]
    for own in ([0, 1, 2, 3], [2], [0, 1]):
        resumed = stream(experts, rows=4, own=own)
        resumed.set_state(position)
        for expected, batch in zip(whole, take(resumed, 6), strict=True):
            assert same(batch.map(lambda f: f[own]), expected.map(lambda f: f[own]))  # noqa: B023


def test_the_seed_decides_the_order(experts):
    one, again, other = (take(stream(experts, seed), 6) for seed in (7, 7, 8))
    assert all(map(same, one, again)) and not all(map(same, one, other))


def test_epochs_differ_in_order(experts):
    order = [n for batch in take(stream(experts, rows=1), 30) for n in first_tokens(batch)]
    first, second = order[:13], order[13:26]
    assert first != second


@pytest.mark.long
@pytest.mark.parametrize("consumed", [0, 1, 5, 9])
def test_a_stream_resumes_from_a_json_position(experts, consumed):
    going = stream(experts)
    take(going, consumed)
    position = json.loads(json.dumps(going.get_state()))
    rest = take(going, 8)
    resumed = stream(experts)
    resumed.set_state(position)
    assert all(map(same, rest, take(resumed, 8)))


def test_parts_are_drawn_by_their_shares_each_item_once_an_epoch(experts):
    order = endless_order([(experts[:3], 0.75), (experts[3:], 0.25)], seed=0)
    drawn = [order[place].chunks[0].prompt_ids[0] for place in range(40)]
    of_first = [n for n in drawn if n <= 3]
    assert len(of_first) == 30
    assert all(set(of_first[place : place + 3]) == {1, 2, 3} for place in range(0, 30, 3))
    assert len({n for n in drawn if n > 3}) == 10


def test_an_empty_part_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        endless_order([([], 1.0)], seed=0)


def test_an_untrainable_trajectory_is_refused_by_name(experts):
    lost = Trajectory("lost", "f", [_chunk(1, 2)], 0.0, "infra_engine")
    with pytest.raises(ValueError, match=r"trajectory lost .* ended as infra_engine"):
        next(stream([lost]))


def test_a_trajectory_with_branches_is_learned_line_by_line_each_turn_once():
    stem = Chunk([7, 500], [501, 502], [0.0, 0.0])
    leaves = [Chunk([8], [503], [0.0]), Chunk([9], [504], [0.0], parent=0, edge="rewind")]
    tree = Trajectory("t", "f", [stem, *leaves], 1.0, "success")
    batches = take(stream([tree], rows=1), 12)
    learned = collections.Counter()
    for batch in batches:
        assert batch.lines_BC is None
        is_learned_BT = batch.kind_BT() == IMITATION
        learned.update(batch.tokens_BT[is_learned_BT].tolist())
    assert set(learned) == {501, 502, 503, 504}
    assert max(learned.values()) - min(learned.values()) <= 1
