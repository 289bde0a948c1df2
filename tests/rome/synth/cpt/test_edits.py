"""Search-and-replace blocks make the new files exactly, or are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.synth.cpt.edits import EditError, apply_edits, write_edits

LINES = st.lists(st.sampled_from(["a", "b", "  c", "", "d\r", "é"]), max_size=24)
quickly = settings(max_examples=120, deadline=None, derandomize=True)


def text_of(lines):
    return "".join(f"{line}\n" for line in lines)


@quickly
@given(LINES, LINES)
def test_blocks_make_the_new_file_from_any_old_one(old, new):
    before = {"f.py": text_of(old), "same.py": "x\n"}
    after = {"f.py": text_of(new), "same.py": "x\n"}
    assert apply_edits(before, write_edits(before, after)) == after


def test_a_change_among_many_equal_lines_is_found_at_one_place():
    old = ["pass"] * 40
    new = [*old[:17], "return", *old[18:]]
    before, after = {"a.py": text_of(old)}, {"a.py": text_of(new)}
    assert apply_edits(before, write_edits(before, after)) == after


def test_only_what_changes_and_a_little_around_it_is_searched_for():
    old = [f"line {number}" for number in range(200)]
    new = [*old[:50], "other", *old[51:], "end"]
    text = write_edits({"a": text_of(old)}, {"a": text_of(new)})
    assert len(text.split("\n")) < 30
    made = write_edits({}, {"new.py": "x\n"})
    assert apply_edits({}, made) == {"new.py": "x\n"}


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"a": "x"}, {"a": "y\n"}, "newline"),
        ({"a": "x\n"}, {}, "deleted"),
        ({"a": "x\n"}, {"a": "=======\n"}, "marker"),
    ],
)
def test_what_blocks_cannot_say_is_refused(before, after, reason):
    with pytest.raises(EditError, match=reason):
        write_edits(before, after)


@pytest.mark.parametrize(
    "text",
    [
        "a\n<<<<<<< SEARCH\nx\n",
        "a\nb\n",
        "a\n<<<<<<< SEARCH\nx\n=======\ny\n>>>>>>> REPLACE\n",  # x is there twice
        "a\n<<<<<<< SEARCH\nz\n=======\ny\n>>>>>>> REPLACE\n",
    ],
)
def test_blocks_that_do_not_apply_at_one_place_are_refused(text):
    with pytest.raises(EditError):
        apply_edits({"a": "x\nq\nx\n"}, text)
