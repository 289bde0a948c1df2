"""The benchmark of the input pipeline at its smallest size."""

import pytest

from benchmarks.input_pipeline import open_stream, run, take, write_corpus
from rome.data.text import read_corpus


def test_a_synthetic_corpus_has_its_size_and_packs_into_full_rows(tmp_path):
    count = write_corpus(tmp_path, 0.3)
    size = (tmp_path / "corpus.jsonl").stat().st_size
    assert 0.3e6 <= size < 0.32e6
    corpus = read_corpus(str(tmp_path), 0.2)  # of few documents, so that some are held out
    assert corpus.count + len(corpus.held_out) == count and not corpus.skipped
    sample = take(open_stream(corpus), 0.5)
    # A busy machine packs a single batch in that time, which the corpus' first rows decide.
    assert sample["tokens"] > 0.9 * sample["slots"]


@pytest.mark.slow
def test_ours_and_the_train_step_are_timed_in_turns():
    found = run(1.0, rounds=1, seconds=0.3, rival_python=None)
    assert found["ratio_train_step_tokens_per_cpu_s"] > 1 and found["packed_share"] > 0.9
