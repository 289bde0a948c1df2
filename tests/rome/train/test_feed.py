"""Which rows a process feeds, and which of them it counts."""

import dataclasses

import jax
import pytest

from rome.model.config import PRESETS
from rome.model.sharding import batch_sharding, make_mesh
from rome.train import feed
from rome.train.feed import own_rows


@dataclasses.dataclass(frozen=True)
class Device:
    number: int
    process_index: int


@dataclasses.dataclass
class Sharding:
    """For each device its process, and the rows of a micro-batch that it holds."""

    places: list

    def devices_indices_map(self, shape):
        return {
            Device(number, process): (slice(*rows),)
            for number, (process, rows) in enumerate(self.places)
        }


@pytest.mark.parametrize(
    ("places", "fed", "counted"),
    [
        ([(0, (0, 2)), (1, (2, 4))], [[0, 1, 4, 5], [2, 3, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (
            [(1, (0, 1)), (0, (1, 2)), (1, (2, 3)), (0, (3, None))],
            [[1, 3, 5, 7], [0, 2, 4, 6]],
            None,
        ),
        ([(0, (0, 4)), (1, (0, 4))], [list(range(8))] * 2, [list(range(8)), []]),  # sequence axis
        ([(0, (None, None))], [list(range(8))], [list(range(8))]),
    ],
)
def test_each_row_is_counted_by_one_of_the_processes_that_feed_it(
    monkeypatch, places, fed, counted
):
    found = []
    for process in range(len(fed)):
        monkeypatch.setattr(feed.jax, "process_index", lambda process=process: process)
        found.append(own_rows(Sharding(places), rows=8, rows_per_microbatch=4))
    assert [own.fed for own in found] == fed
    assert [own.counted for own in found] == (counted or fed)
    assert sorted(row for own in found for row in own.counted) == list(range(8))


def test_one_process_has_all_rows():
    mesh = make_mesh(
        {"replica": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1},
        PRESETS["tiny"],
        jax.devices()[:1],
    )
    assert own_rows(batch_sharding(mesh), 6, 3) == (list(range(6)), list(range(6)))
