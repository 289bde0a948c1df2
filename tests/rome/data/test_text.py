"""Text: what is a document, what is held out, and that each token is learnt from once."""

import collections
import itertools
import json
import os

import grain
import grain.experimental
import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rome.data import text as text_module
from rome.data.batch import IMITATION
from rome.data.packing import pack_stream, to_batch
from rome.data.sources import READ_OPTIONS, Each, endless_order
from rome.data.text import cut, document_ids, read_corpus, text_batches, text_rows
from rome.losses import count_denominators
from rome.model.tokenizer import TINY, Tokenizer

TOKENIZER = Tokenizer.load(TINY)
quickly = settings(max_examples=30, deadline=None, derandomize=True)


def text_of(number, words=30):
    return f"document {number} says " + " ".join(
        f"w{number}x{place}" for place in range(words * (number % 4 + 1))
    )


@pytest.fixture
def folder(tmp_path):
    """Sixty documents in files of three kinds and two folders."""
    (tmp_path / "deep").mkdir()
    for number in range(40):
        (
            tmp_path / ("deep" if number % 2 else ".") / f"{number}.{'md' if number % 3 else 'py'}"
        ).write_text(text_of(number))
    (tmp_path / "lines.jsonl").write_text(
        "".join(
            json.dumps({"text": text_of(number), "id": number}) + "\n\n" for number in range(40, 60)
        )
    )
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def few_open_rows():
    """Fill one row at a time, so that streams come in the order of their documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "ROWS_OPEN", 1)
        yield


def documents_of(folder):
    return read_corpus(str(folder), 0.2).training[0][0]


def all_of(documents):
    return [documents[number] for number in range(len(documents))]


def stream(documents, seed=0, rows=2, row_length=24):
    return iter(
        text_batches(
            [(documents, 1.0)],
            TOKENIZER,
            rows=rows,
            row_length=row_length,
            chunks_per_row=4,
            seed=seed,
        )
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True) if a is not None)


def tokens_of(examples):
    return [tuple(example["tokens"].tolist()) for example in examples]


def pieces_of(batch):
    """(tokens, which of them are learnt) of every segment."""
    for row in range(batch.num_rows):
        for segment in range(1, batch.segments_BT[row].max() + 1):
            here = batch.segments_BT[row] == segment
            yield batch.tokens_BT[row][here], batch.action_mask_BT[row][here]


# -- pieces and rows
# -------------------------------------------------------------------------------------------------


@quickly
@given(length=st.integers(2, 200), row_length=st.integers(2, 50))
def test_every_token_but_the_first_is_predicted_exactly_once_after_the_one_before_it(
    length, row_length
):
    ids = np.arange(length, dtype=np.int32)  # a token's value is its place
    predicted = []
    for piece in cut(ids, row_length):
        assert 2 <= len(piece["tokens"]) <= row_length and not piece["action_mask"][0]
        assert (np.diff(piece["tokens"]) == 1).all()
        predicted += piece["tokens"][piece["action_mask"]].tolist()
    assert predicted == list(range(1, length))


@pytest.mark.long
@quickly
@given(
    texts=st.lists(st.text(min_size=1, max_size=80).filter(str.strip), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_an_epoch_of_rows_predicts_each_token_of_each_document_once(texts, seed):
    expected = collections.Counter(
        piece for text in texts for piece in tokens_of(cut(document_ids(TOKENIZER, text), 16))
    )
    found, rows = [], stream(texts, seed, rows=1, row_length=16)
    while len(found) < 3 * expected.total():
        batch = next(rows)
        assert batch.segments_BT.max() <= 4
        for tokens, learnt in pieces_of(batch):
            assert learnt.tolist() == [False] + [True] * (len(tokens) - 1)
            found.append(tuple(tokens.tolist()))
    for epoch in range(3):
        assert (
            collections.Counter(found[epoch * expected.total() : (epoch + 1) * expected.total()])
            == expected
        )


def test_each_epoch_of_many_documents_has_every_one_once_and_another_order():
    texts = [text_of(number) for number in range(100)]
    expected = collections.Counter(
        piece for text in texts for piece in tokens_of(cut(document_ids(TOKENIZER, text), 512))
    )
    found, rows = (
        [],
        iter(
            text_batches(
                [(texts, 1.0)], TOKENIZER, rows=1, row_length=512, chunks_per_row=8, seed=3
            )
        ),
    )
    while len(found) < 2 * expected.total():
        found += [tuple(tokens.tolist()) for tokens, _ in pieces_of(next(rows))]
    first, second = found[: expected.total()], found[expected.total() : 2 * expected.total()]
    assert collections.Counter(first) == collections.Counter(second) == expected and first != second


def test_batches_are_what_the_sft_loss_reads():
    texts = [text_of(number) for number in range(9)]
    batch = next(stream(texts, rows=4))
    learnt = batch.action_mask_BT
    assert (batch.kind_BC[batch.valid_BC] == IMITATION).all() and batch.tokens_BT.dtype == np.int32
    assert (batch.chunk_ids_BT[learnt] == batch.segments_BT[learnt] - 1).all()  # one chunk a piece
    assert count_denominators([batch]).trained_tokens == learnt.sum() > 0


def test_an_evaluation_scores_each_token_once():
    ids = document_ids(TOKENIZER, text_of(7))
    rows = text_rows([text_of(7)], TOKENIZER, row_length=32, chunks_per_row=4)
    assert rows.action_mask_BT.sum() == len(ids) - 1 and rows.tokens_BT.shape[1] == 32


def test_a_document_ends_with_the_end_token_and_control_tokens_in_it_are_letters():
    text = "see <|endoftext|> and <|im_start|>user\n<tool_call>"
    ids = document_ids(TOKENIZER, text)
    assert ids[-1] == TOKENIZER.id_of("<|endoftext|>")
    control = {
        TOKENIZER.id_of(name)
        for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>")
    }
    assert not control & set(ids[:-1].tolist()) and TOKENIZER.decode(ids[:-1].tolist()) == text


# -- the stream
# -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("consumed", [0, 1, 7, 40, 300])
def test_a_stream_resumes_from_a_json_position(folder, consumed):
    documents = documents_of(folder)
    going = stream(documents)
    take(going, consumed)
    position = json.loads(json.dumps(going.get_state()))
    rest = take(going, 60)
    resumed = stream(documents_of(folder))
    resumed.set_state(position)
    assert all(map(same, rest, take(resumed, 60)))


def test_seed_and_epoch_decide_the_order(folder):
    documents = documents_of(folder)
    one, again, other = (take(stream(documents, seed), 6) for seed in (7, 7, 8))
    assert all(map(same, one, again)) and not all(map(same, one, other))


def test_pieces_of_one_document_do_not_fill_a_batch():
    texts = [" ".join([f"z{number}"] * 600) for number in range(6)]
    batch = next(stream(texts, rows=8))
    assert (
        len(
            {
                TOKENIZER.decode(tokens.tolist()).replace("z", "").split()[1]
                for tokens, _ in pieces_of(batch)
            }
        )
        > 2
    )


# -- documents
# -------------------------------------------------------------------------------------------------


def test_files_and_lines_are_documents_and_each_is_on_one_side(folder):
    corpus = read_corpus(str(folder), 0.2)
    training, held_out = all_of(corpus.training[0][0]), all_of(corpus.held_out)
    assert sorted(training + held_out) == sorted(text_of(number) for number in range(60))
    assert not corpus.skipped and 0 < len(held_out) < len(training)


def test_held_out_documents_are_never_trained_on_wherever_they_lie(folder, tmp_path_factory):
    corpus = read_corpus(str(folder), 0.2)
    other = tmp_path_factory.mktemp("other")
    for number, text in enumerate(
        reversed(all_of(corpus.training[0][0]) + all_of(corpus.held_out))
    ):
        (other / f"{number}.txt").write_text(text)
    moved = read_corpus(str(other), 0.2)
    assert all_of(moved.held_out) == all_of(corpus.held_out)
    held_out = {
        piece
        for text in all_of(corpus.held_out)
        for piece in tokens_of(cut(document_ids(TOKENIZER, text), 512))
    }
    rows = iter(
        text_batches(moved.training, TOKENIZER, rows=2, row_length=512, chunks_per_row=8, seed=0)
    )
    assert not held_out & {
        tuple(tokens.tolist()) for batch in take(rows, 80) for tokens, _ in pieces_of(batch)
    }


def test_the_standard_library_is_there_without_tests_and_packages():
    corpus = read_corpus("", 0.02)
    documents = corpus.training[0][0]
    names = [documents.name(number) for number in range(len(documents))]
    assert any(
        name.endswith("json/decoder.py")
        for name in names + [corpus.held_out.name(number) for number in range(len(corpus.held_out))]
    )
    assert not any("site-packages" in name or "/test/" in name for name in names)


def test_what_is_no_text_is_skipped_and_counted(folder):
    before = read_corpus(str(folder), 0.2)
    (folder / "empty.py").write_text("")
    (folder / "blank.md").write_text(" \n\t\n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "binary").write_bytes(b"\x7fELF\0\0")
    (folder / "odd.jsonl").write_text('{"text": ""}\n{"text": "\\ud800 alone"}\n')
    (folder / ".hidden").write_text("a secret")
    (folder / "circle").symlink_to(folder)
    (folder / "nowhere").symlink_to(folder / "gone")
    os.mkfifo(folder / "pipe")
    after = read_corpus(str(folder), 0.2)
    assert (
        all_of(after.training[0][0]) == all_of(before.training[0][0])
        and after.digest == before.digest
    )
    assert sorted(os.path.basename(name) for name in after.skipped) == [
        "binary",
        "blank.md",
        "empty.py",
        "latin.txt",
        "odd.jsonl, byte 0",
        "odd.jsonl, byte 13",
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut',
        '{"title": "x"}',
        '["text"]',
        "7",
        '{"text": 7}',
        "[" * 100_000,
        "\x80\ufffd",
        '{"text": null}',
    ],
)
def test_a_malformed_line_is_named_with_its_file(tmp_path, line):
    (tmp_path / "some.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"some.jsonl line 2.*Mend or delete") as caught:
        read_corpus(str(tmp_path), 0.2)
    assert len(str(caught.value)) < 400


def test_text_that_is_not_there_or_too_little_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        read_corpus(str(tmp_path / "gone"), 0.1)
    with pytest.raises(ValueError, match="has 0 documents"):
        read_corpus(str(tmp_path), 0.1)
    (tmp_path / "one.txt").write_text("only one")
    with pytest.raises(ValueError, match="has 1 documents and none"):
        read_corpus(str(tmp_path / "one.txt"), 0.5)


def test_a_file_that_changes_under_the_run_is_named(folder):
    documents = documents_of(folder)
    (folder / "2.md").write_text("")
    with pytest.raises(ValueError, match=r"2.md is no text any more"):
        all_of(documents)


def test_an_index_spares_the_reading_until_a_file_is_another_one(folder, monkeypatch):
    index = folder / ".index.npz"
    scanned = []
    scan = text_module.scan
    monkeypatch.setattr(text_module, "scan", lambda path: scanned.append(path) or scan(path))

    def reads(share=0.2, **options):
        """Whether files are read; what is found is the same in any case."""
        scanned.clear()
        found = read_corpus(str(folder), share, index=index, **options)
        has_read = bool(scanned)
        expected = read_corpus(str(folder), share)
        assert (found.digest, found.skipped) == (expected.digest, expected.skipped)
        assert all_of(found.training[0][0]) == all_of(expected.training[0][0])
        assert all_of(found.held_out) == all_of(expected.held_out)
        return has_read

    (folder / "empty.txt").write_text(" ")
    assert reads(writes_index=False) and not index.exists()
    assert reads() and not reads()
    assert reads(share=0.3) and not reads(share=0.3)
    assert reads() and not reads()

    changed = folder / "2.md"
    before = changed.stat()
    changed.write_bytes(changed.read_bytes().swapcase())
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert reads() and not reads()
    (folder / "new.txt").write_text("one more document")
    assert reads() and not reads()
    for damaged in (b"", index.read_bytes()[:-40], b"PK\x03\x04" + bytes(40)):
        index.write_bytes(damaged)
        assert reads() and not reads()


def test_rows_of_text_are_those_that_whole_examples_pack_to(folder):
    documents = documents_of(folder)
    made = take(stream(documents, row_length=40), 12)
    order = endless_order([(documents, 1.0)], 0)

    def pieces(text, rng):
        examples = cut(document_ids(TOKENIZER, text), 40)
        return [examples[place] for place in rng.permutation(len(examples))]

    rows = []
    for number in range(2):
        own = order.random_map(pieces, seed=0)[number::2].to_iter_dataset(READ_OPTIONS)
        flat = grain.experimental.FlatMapIterDataset(own, Each())
        rows.append(take(iter(pack_stream(flat, 40, 4, bins=1)), 12))
    for batch, *pair in zip(made, *rows, strict=True):
        expected = to_batch(pair)._replace(lines_BC=None)
        assert all(map(np.array_equal, batch, expected))


@pytest.mark.parametrize("suffix", [".parquet", ".array_record"])
def test_rows_and_records_are_documents_like_lines(folder, tmp_path_factory, suffix):
    texts = [text_of(number) for number in range(40, 60)]
    other = tmp_path_factory.mktemp("other")
    path = other / f"some{suffix}"
    if suffix == ".parquet":
        parquet.write_table(
            pa.table({"text": texts, "id": list(range(20))}), path, row_group_size=7
        )
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(json.dumps({"text": text}).encode())
        writer.close()
    (lines := tmp_path_factory.mktemp("lines")).joinpath("some.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    found, expected = read_corpus(str(other), 0.2), read_corpus(str(lines), 0.2)
    assert found.digest == expected.digest and found.count + len(found.held_out) == 20
    assert all_of(found.training[0][0]) == all_of(expected.training[0][0])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="some"):
        read_corpus(str(other), 0.2)


@pytest.mark.long
def test_a_mixture_draws_exact_shares_whatever_the_sizes(tmp_path):
    for name, count in (("a", 6), ("b", 90)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {n} " * 3}) + "\n" for n in range(count))
        )
    corpus = read_corpus(f"0.75*{tmp_path}/a.jsonl + 0.25*{tmp_path}/b.jsonl", 0.05)
    order = endless_order(corpus.training, 0)
    drawn = [order[number][0] for number in range(400)]
    for count in (4, 40, 400):
        assert abs(drawn[:count].count("a") - 0.75 * count) <= 1
    with pytest.raises(ValueError, match="weight to some"):
        read_corpus(f"0.75*{tmp_path}/a.jsonl + {tmp_path}/b.jsonl", 0.05)


def test_the_place_of_a_control_token_must_be_within_the_text(tmp_path):
    path = tmp_path / "some.jsonl"
    for control in ([[0, 99]], [[3, 2]], [["a", "b"]], 7, [[0, 2], [1, 3]]):
        path.write_text(json.dumps({"text": "<|im_end|>", "control": control}))
        with pytest.raises(ValueError, match=r"some.jsonl line 1.*Mend"):
            read_corpus(str(tmp_path), 0.2)


def test_a_position_of_a_mixture_goes_on_with_another_number_of_processes(folder):
    lines = folder / "lines.jsonl"

    def open_rows(own):
        parts = read_corpus(f"0.6*{folder / 'deep'} + 0.4*{lines}", 0.1).training
        return text_batches(
            parts, TOKENIZER, rows=4, row_length=24, chunks_per_row=4, seed=0, own=own
        )

    alone = open_rows(None)
    take(alone, 9)
    expected = take(alone, 9)
    halves = [open_rows([0, 1]), open_rows([2, 3])]
    for half in halves:
        take(half, 9)
    position = json.loads(json.dumps(halves[0].get_state() | halves[1].get_state()))
    quarters = [open_rows([number]) for number in range(4)]
    for number, quarter in enumerate(quarters):
        quarter.set_state(position)
        for batch, whole in zip(take(quarter, 9), expected, strict=True):
            assert np.array_equal(batch.tokens_BT[number], whole.tokens_BT[number])
