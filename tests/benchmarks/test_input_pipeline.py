"""The benchmark of the input pipeline at its smallest size."""

import itertools

import numpy as np
import pytest

from benchmarks.input_pipeline import open_stream, run, write_corpus
from rome.data.text import read_corpus


def test_a_synthetic_corpus_has_its_size_and_packs_into_full_rows(tmp_path):
    count = write_corpus(tmp_path, 0.3)
    size = (tmp_path / "corpus.jsonl").stat().st_size
    assert 0.3e6 <= size < 0.32e6
    corpus = read_corpus(str(tmp_path), 0.2)  # of few documents, so that some are held out
    assert corpus.count + len(corpus.held_out) == count and not corpus.skipped
    # Twelve batches, however long they take: how full a single one is, its documents decide.
    batches = itertools.islice(open_stream(corpus), 12)
    slots = np.concatenate([batch.segments_BT.ravel() for batch in batches])
    assert np.count_nonzero(slots) > 0.9 * slots.size


@pytest.mark.slow
def test_ours_and_the_train_step_are_timed_in_turns():
    found = run(1.0, rounds=1, seconds=2.0, rival_python=None)
    assert found["ratio_train_step_tokens_per_cpu_s"] > 1 and found["packed_share"] > 0.9
