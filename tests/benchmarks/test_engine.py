"""The engine's benchmark at its smallest size, and the share of prompts that sessions reuse."""

import pytest

from benchmarks.engine import WORKLOADS, run_size, summarize


@pytest.mark.slow
def test_every_workload_is_timed_and_sessions_find_their_history_in_the_cache():
    rows = run_size("toy", rounds=1, pythons={})
    assert [row["workload"] for row in rows] == [*WORKLOADS, "open"]
    timed = rows[:-1]
    assert all(row["tokens_per_s"] > 0 and row["tokens_per_cpu_s"] > 0 for row in timed)
    assert 0 < rows[-1]["ttft_ms_p50"] < rows[-1]["latency_ms_p50"] <= rows[-1]["latency_ms_p99"]
    assert summarize(rows)["ttft_ms"] > 0
    # The last token that a turn samples is never in the cache: 3 of 672 tokens a conversation.
    assert summarize(rows)["cached_prompt_share"] > 0.99
