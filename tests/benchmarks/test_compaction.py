"""The bar of compaction: at a quarter of the context nine tasks of ten still succeed."""

import asyncio

from benchmarks.compaction import measure, play


def test_a_quarter_of_the_context_is_enough():
    figures = asyncio.run(measure(tasks=8, part=4, forgets=0.25, fails=0.1))
    assert figures["whole"]["success"] == 1.0, "the task itself can be done"
    assert figures["ratio"] >= 0.9
    assert figures["compacted"]["compactions"] >= 1 and figures["compacted"]["moved"] >= 5


def test_the_model_knows_only_what_it_is_shown():
    """Where nothing keeps the context short, or summaries leave everything out, none succeeds."""
    for mode, forgets in (("unmanaged", 0.0), ("no_files", 1.0)):
        assert not any(asyncio.run(play(seed, mode, 4, forgets, 0.0)).success for seed in range(3))
