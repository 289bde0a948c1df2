"""The benchmark of dispatches at its smallest size: it compares the bits of one step and eight."""

import pytest

from benchmarks.dispatch import ROWS, run_size


@pytest.mark.slow
def test_every_workload_is_timed_and_all_step_counts_give_the_same_bits():
    rows = run_size("toy", [1, 8], rounds=1)
    assert len(rows) == 2 * (len(ROWS) + 1)
    assert all(row["process_us"] > 0 for row in rows)
