"""Plain documents: every token but a document's first is learnt once, what is held out never, and the stream resumes exactly."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.batch import IMITATION
from rome.data.text import Documents, Pieces, text_batches, text_rows
from rome.model.tokenizer import TINY, Tokenizer

TOKENIZER = Tokenizer.load(TINY)


def folder(place, count=40):
    """Some documents of every kind."""
    (place / "sub").mkdir(parents=True)
    for number in range(count // 2):
        (place / "sub" / f"{number}.txt").write_text(f"document {number} " * (1 + number))
    lines = [json.dumps({"text": f"line {number} of many; " * (1 + number % 7)}) for number in range(count - count // 2)]
    (place / "lines.jsonl").write_text("\n\n".join(lines) + "\n")
    return str(place)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=300), min_size=1, max_size=6), row_length=st.integers(2, 40))
def test_every_token_but_a_documents_first_is_learnt_once(texts, row_length):
    batch = text_rows(texts, TOKENIZER, row_length=row_length, chunks_per_row=row_length)
    learnt, expected = [], []
    for row in range(batch.num_rows):
        for segment in range(1, batch.segments_BT[row].max() + 1):
            inside = batch.segments_BT[row] == segment
            tokens, mask = batch.tokens_BT[row][inside], batch.action_mask_BT[row][inside]
            assert not mask[0] and mask[1:].all() and (batch.chunk_ids_BT[row][inside][1:] == segment - 1).all()
            learnt += list(zip(tokens[:-1].tolist(), tokens[1:].tolist()))
    for text in filter(None, texts):
        ids = TOKENIZER.encode(text) + [TOKENIZER.pad]
        expected += list(zip(ids[:-1], ids[1:]))
    assert sorted(learnt) == sorted(expected) and (batch.kind_BC[batch.valid_BC] == IMITATION).all()


def test_control_tokens_in_a_document_are_plain_text():
    (example,) = Pieces(TOKENIZER, 1000).flat_map("a <|im_start|> b <|endoftext|> c")
    assert TOKENIZER.im_start not in example["tokens"] and list(example["tokens"]).index(TOKENIZER.pad) == len(example["tokens"]) - 1


def test_each_document_is_trained_on_or_held_out_and_that_does_not_change(tmp_path):
    place = folder(tmp_path / "text")
    train, held_out = Documents(place, 0.3), Documents(place, 0.3, evaluation=True)
    texts = [[documents[index] for index in range(len(documents))] for documents in (train, held_out)]
    assert len(train) + len(held_out) == 40 and len(held_out) > 3 and not set(texts[0]) & {text for text in texts[1] if texts[1].count(text) == 1} - set(texts[0])
    (tmp_path / "text" / "a new one.md").write_text("new")
    assert set(texts[0]) <= {text for documents in [Documents(place, 0.3)] for text in (documents[index] for index in range(len(documents)))}


def test_an_epoch_has_every_document_once_and_the_stream_goes_on_where_it_was(tmp_path):
    documents = Documents(folder(tmp_path / "text"), 0.1)
    open_stream = lambda: iter(text_batches(documents, TOKENIZER, rows=2, row_length=32, chunks_per_row=8, seed=3))
    stream = open_stream()
    batches, states = [], []
    for _ in range(120):
        batches.append(next(stream))
        states.append(json.loads(json.dumps(stream.get_state())))
    ends = sum(int((batch.tokens_BT == TOKENIZER.pad)[batch.segments_BT > 0].sum()) for batch in batches)
    assert ends > len(documents)  # more than one epoch
    again = open_stream()
    again.set_state(states[49])
    for batch in batches[50:70]:
        for one, other in zip(batch, next(again)):
            np.testing.assert_array_equal(one, other)


def test_odd_files_are_no_documents_and_broken_lines_are_named(tmp_path):
    (tmp_path / "binary.dat").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "good.txt").write_text("good")
    documents = Documents(str(tmp_path), 0.0)
    assert sorted(documents[index] for index in range(len(documents))) == ["", "", "good"]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 3}\n')
    documents = Documents(str(tmp_path / "bad.jsonl"), 0.0)
    assert documents[0] == "a"
    with pytest.raises(ValueError, match='bad.jsonl: a line is no JSON object with a string "text"'):
        documents[1]


def test_a_place_without_documents_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="set config.text"):
        Documents(str(tmp_path / "nowhere"), 0.0)
    with pytest.raises(ValueError, match="no documents in"):
        Documents(str(tmp_path), 0.0)


def test_without_a_place_the_standard_library_is_read():
    documents = Documents("", 0.02)
    assert len(documents) > 100 and all(path.suffix == ".py" and "site-packages" not in pathlib.Path(path).parts for path, _ in documents._index)
