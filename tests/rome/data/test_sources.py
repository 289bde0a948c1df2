"""The SFT stream: complete epochs, one order for a seed, an exact position."""

import collections
import itertools
import json

import numpy as np
import pytest

from rome.data.sources import TrajectoryFiles, sft_batches
from rome.data.trajectory import Chunk, Trajectory, save_trajectory


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


def stream(trajectories, seed=0, rows=2):
    return iter(sft_batches(trajectories, rows=rows, row_length=24, chunks_per_row=4, seed=seed))


def first_tokens(batch):
    return batch.tokens_BT[(batch.positions_BT == 0) & (batch.segments_BT > 0)].tolist()


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_batches_have_one_shape_and_each_epoch_has_every_trajectory_once(experts):
    batches = take(stream(experts), 12)
    assert {batch.tokens_BT.shape for batch in batches} == {(2, 24)}
    seen = [n for batch in batches for n in first_tokens(batch)]
    counts = collections.Counter(seen)
    assert set(counts) == set(range(1, 14)) and max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_decides_the_order(experts):
    one, again, other = (take(stream(experts, seed), 6) for seed in (7, 7, 8))
    assert all(map(same, one, again)) and not all(map(same, one, other))


def test_epochs_differ_in_order(experts):
    order = [n for batch in take(stream(experts, rows=1), 30) for n in first_tokens(batch)]
    first, second = order[:13], order[13:26]
    assert first != second


@pytest.mark.parametrize("consumed", [0, 1, 5, 9])
def test_a_stream_resumes_from_a_json_position(experts, consumed):
    going = stream(experts)
    take(going, consumed)
    position = json.loads(json.dumps(going.get_state()))
    rest = take(going, 8)
    resumed = stream(experts)
    resumed.set_state(position)
    assert all(map(same, rest, take(resumed, 8)))


def test_files_give_what_was_saved_in_the_order_of_their_names(experts, tmp_path):
    for trajectory in experts:
        save_trajectory(trajectory, tmp_path / f"{trajectory.task}.json")
    files = TrajectoryFiles(tmp_path)
    assert len(files) == len(experts) and list(files) == sorted(
        experts, key=lambda t: f"{t.task}.json"
    )
    assert same(next(stream(files)), next(stream(list(files))))


def test_an_empty_directory_and_an_empty_list_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no trajectory"):
        TrajectoryFiles(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        sft_batches([], rows=1, row_length=8, chunks_per_row=1, seed=0)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json"):
        TrajectoryFiles(tmp_path)[0]


def test_an_untrainable_trajectory_is_refused_by_name(experts):
    lost = Trajectory("lost", "f", [_chunk(1, 2)], 0.0, "infra_engine")
    with pytest.raises(ValueError, match=r"trajectory lost .* ended as infra_engine"):
        next(stream([lost]))
