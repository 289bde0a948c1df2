"""A task in a corpus is found however it is laid out, across any reading border; a clean corpus has
none.
"""

import dataclasses
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.sources import load_tasks
from rome.evals import contamination
from rome.evals.contamination import N, TaskIndex, find_contamination, ngrams_of, words_of
from rome.evals.run import describe_contamination
from tests.rome.evals.tasks import write, write_task

GUID = "5a0ce1b4-3f4c-4f0e-9b8e-0123456789ab"
TEXT = (
    "Sort the fourteen lines of the café's ledger by date, drop each duplicate entry, and write"
    " them to a fresh file."
)


@pytest.fixture
def tasks(tmp_path):
    write_task(
        tmp_path / "tasks", "ledger", instruction=f"<!-- harbor-canary GUID {GUID} -->\n{TEXT}\n"
    )
    write_task(
        tmp_path / "tasks",
        "other",
        instruction=(
            "Count the words of every book on the long wooden shelf and tell me only the largest"
            " number.\n"
        ),
    )
    write_task(tmp_path / "tasks", "short", instruction="Say hello.\n")
    return load_tasks(str(tmp_path / "tasks"))


def search(tmp_path, tasks, **files):
    write(tmp_path / "corpus", {name.replace("_", "."): content for name, content in files.items()})
    return find_contamination(tasks, tmp_path / "corpus")


@pytest.mark.parametrize(
    "layout",
    [
        TEXT,
        TEXT.upper(),
        TEXT.replace(" ", "\n> * "),
        "x " * 50 + TEXT.replace("é", "e\u0301") + " y" * 50,
        TEXT.replace("file", "ﬁle"),
    ],
)
def test_an_instruction_is_found_in_any_layout(tmp_path, tasks, layout):
    found = search(
        tmp_path, tasks, a_txt="nothing here\n", b_md=f"first line\n{layout}\nlast line\n"
    )
    assert [(hit["task"], hit["share"]) for hit in found["hits"]] == [("ledger", 1.0)]
    assert found["hits"][0]["places"][0]["file"] == "b.md" and found["unchecked"] == ["short"]


def test_a_part_counts_for_its_share_and_fewer_than_13_words_for_nothing(tmp_path, tasks):
    words = words_of(TEXT)
    assert search(tmp_path, tasks, a_txt=" ".join(words[: N - 1]))["hits"] == []
    (hit,) = search(tmp_path, tasks, a_txt="\n" + " ".join(words[: N + 1]))["hits"]
    assert (
        hit["ngrams"] == 2
        and hit["share"] == pytest.approx(2 / (len(words) - N + 1), abs=1e-4)
        and hit["places"][0]["line"] == 2
    )


def test_a_canary_is_found_though_the_agent_never_sees_it(tmp_path, tasks):
    assert GUID not in tasks[0].instruction
    (hit,) = search(tmp_path, tasks, a_txt=f"one\ntwo {GUID.upper()}\n")["hits"]
    assert (hit["task"], hit["canaries"], hit["share"], hit["places"][0]["line"]) == (
        "ledger",
        [GUID],
        0.0,
        2,
    )


def test_escapes_of_json_hide_nothing(tmp_path, tasks):
    """Most corpora are JSONL: their line breaks and letters are escaped, some of them twice."""
    broken = TEXT.replace(" the ", "\n\tthe ")
    once = json.dumps({"text": f"{broken}\n{GUID}"})
    for line in (once, json.dumps({"row": once})):
        (hit,) = search(tmp_path, tasks, a_jsonl=line + "\n")["hits"]
        assert hit["share"] == 1.0 and hit["canaries"] == [GUID]
    written = r"Write \nabla and \u00e9 as they stand here with their backslashes in this very file"
    assert ngrams_of(written) == ngrams_of(json.loads(json.dumps(json.dumps(written))))


def test_a_packed_file_is_named_and_not_called_clean(tmp_path, tasks):
    search(tmp_path, tasks, a_txt="nothing of it", b_txt=TEXT.encode("utf-16"))
    (tmp_path / "corpus" / "c.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "corpus" / "d.parquet").write_bytes(b"PAR1" + TEXT.encode())
    found = find_contamination(tasks, tmp_path / "corpus")
    assert [hit["places"][0]["file"] for hit in found["hits"]] == ["b.txt"]
    assert [name.partition(":")[0] for name in found["unreadable"]] == ["c.gz", "d.parquet"]
    assert "2 files were not searched, such as c.gz" in describe_contamination(found, 3)[-1]


def test_tasks_of_two_sets_that_share_a_name_are_both_found(tasks):
    one, other = (dataclasses.replace(task, name="same") for task in tasks[:2])
    index = TaskIndex([one, other])
    assert index.owners_in(one.instruction) == index.owners_in(other.instruction) == {"same"}


def test_a_clean_corpus_and_one_of_bytes_have_no_hit_and_an_empty_one_is_refused(tmp_path, tasks):
    assert (
        search(tmp_path, tasks, a_txt="the quick brown fox " * 100, b_bin=bytes(range(256)) * 20)[
            "hits"
        ]
        == []
    )
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=place):
            find_contamination(tasks, tmp_path / place)


def test_every_step_of_a_task_is_looked_for_by_itself():
    (task,) = load_tasks("harbor/inventory-steps")
    (hit,) = find_contamination([task], task.path / "steps")["hits"]
    assert hit["share"] == 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 90), st.text(st.sampled_from("abn\\ \n.\u0301é"), min_size=1, max_size=300))
def test_reading_in_chunks_changes_nothing(tmp_path_factory, size, text):
    """Each run of 13 words of the text is found again in its own file, whatever the chunks; an
    oracle reads the whole at once.
    """
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(text, newline="")
    owners = {gram: ["t"] for gram in ngrams_of(text)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "CHUNK_BYTES", size)
        hits = contamination.collections.defaultdict(contamination._Hits)
        count = contamination._scan(path, "a.txt", owners, {}, hits)
    assert count == len(words_of(text)) and hits["t"].ngrams == set(owners)
