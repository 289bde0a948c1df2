"""Records of files: found by content, each read from its place; torn ones named, never fatal."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rome.data.formats import files
from rome.data.formats.conversation import UnfitError
from rome.data.formats.files import find_files, find_records, parse, read_bytes
from tests.rome.data.formats import samples


def read_all(path):
    """Return the records of a file; the message where there is none."""
    found = []
    for place in find_records(path):
        try:
            if isinstance(place, UnfitError):
                raise place
            found.append(parse(read_bytes(path, place)))
        except UnfitError as error:
            found.append(str(error))
    return found


RECORDS = [{"n": number, "text": text} for number, text in enumerate(("a", "é\n", "\u2028]"))]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_of_records_is_read_one_by_one(tmp_path, indent, ascii_only):
    path = tmp_path / "x.json"
    path.write_text(" \n" + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only) + "\n")
    assert read_all(path) == RECORDS


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
def test_lines_are_records_whatever_the_file_is_called(tmp_path, name, end):
    path = tmp_path / name
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path.write_text("\n\n".join(lines) + end)
    assert read_all(path) == RECORDS


@pytest.mark.parametrize("indent", [None, 2])
def test_a_document_is_one_record_and_so_is_a_list_of_messages(tmp_path, indent):
    for record in (samples.ATIF, samples.MESSAGES):
        path = tmp_path / "x.traj"
        path.write_text(json.dumps(record, indent=indent))
        assert read_all(path) == [record]


def test_a_row_of_parquet_is_a_record_without_its_nulls(tmp_path):
    path = tmp_path / "x.bin"
    rows = [{"messages": samples.MESSAGES[1:2], "n": n, "none": None} for n in range(5)]
    rows[2]["messages"] = samples.MESSAGES
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, path, row_group_size=2)
    found = read_all(path)
    assert [record["n"] for record in found] == list(range(5))
    assert found[2]["messages"] == samples.MESSAGES and "none" not in found[2]
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_all(path)) == 1 and "not parquet" in read_all(path)[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ["empty"]),
        (b"  \n", ["empty"]),
        (b"{", ["not JSON"]),
        (b'{"a": 1', ["not JSON"]),
        (b"\xff\xfe{", ["not UTF-8: byte 0 is 0xff"]),
        (b"[]", ["an empty list"]),
        (b'[{"a": 1}, {"b"', [{"a": 1}, "torn"]),
        (b'[{"a": 1}] x', [{"a": 1}, "more after the end"]),
        (b'[{"a": "\xff"}]', ["not UTF-8: byte 8"]),
        (b"[" * 5000 + b"]" * 5000, ["torn|nested too deeply|JSON"]),
        (b"NaN", [None]),
        (b'{"a": "\\ud800"}', ["surrogate"]),
    ],
)
def test_broken_documents_are_named_and_what_is_whole_is_read(tmp_path, content, expected):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    found = read_all(path)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        if isinstance(want, str):
            assert isinstance(got, str) and any(word in got for word in want.split("|")), got
        elif want is not None:
            assert got == want


def test_a_torn_line_is_one_record_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \n\xff\n{"c": 3}\n{"d"')
    found = read_all(path)
    assert found[0] == {"a": 1} and found[3] == {"c": 3}
    assert "not JSON" in found[1] and "not UTF-8" in found[2] and "not JSON" in found[4]


def test_an_absurd_length_is_refused_without_reading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 50)
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 500)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "x" * 200}) + "\n" + json.dumps({"b": 1}) + "\n")
    long, short = read_all(path)
    assert "210 bytes long; at most 50" in long and short == {"b": 1}
    document = tmp_path / "x.json"
    document.write_text("[" + "1," * 300 + "1]")
    assert "write it as JSON Lines" in read_all(document)[0]


def test_a_folder_has_its_known_files_in_order_and_no_hidden_ones(tmp_path):
    for name in ("b.json", "a/c.parquet", "a/d.TRAJ", ".x.json", ".git/e.json", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    names = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path)]
    assert names == ["b.json", "a/c.parquet", "a/d.TRAJ"]
    assert find_files(tmp_path / "README.md") == [tmp_path / "README.md"]
    with pytest.raises(ValueError, match="no file or folder"):
        find_files(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file that ends with .json, .jsonl"):
        find_files(tmp_path / "empty")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.mkdir()
    assert "cannot be read" in read_all(path)[0]
