"""Which documents repeat others."""

import random

from rome.synth.cpt.document import FILE_SEPARATOR, REPOSITORY_NAME, Control, make_document
from rome.synth.cpt.filters import Duplicates
from rome.synth.cpt.texts import fim_parts


def words(start, count):
    return " ".join(f"w{number}" for number in range(start, start + count))


def test_exact_and_near_copies_are_found_within_their_kind():
    duplicates = Duplicates()
    text = words(0, 400)
    assert duplicates.fault("file", text) == ""
    assert duplicates.fault("file", f"{text}\n") == "exact"
    assert duplicates.fault("file", f"{text} and one more") == "near"
    assert duplicates.fault("file", words(200, 400)) == ""  # a third is shared
    assert duplicates.fault("repair", text) == ""


def test_issues_of_one_repository_are_told_apart_by_what_they_ask_for():
    duplicates = Duplicates()
    files = "\n".join(f"path/{number}.py" for number in range(400))
    first, second = (f"{files}\n\n## Issue\n{words(n, 30)}" for n in (0, 900))
    assert [duplicates.fault("localisation", one) for one in (first, second)] == ["", ""]
    assert duplicates.fault("localisation", first.replace("path/7.py", "x")) == "near"


def test_a_part_in_the_middle_hides_neither_copies_nor_tasks():
    """What is compared is the file as it was, not the order in which its parts are asked for."""
    text = "".join(f"{words(10 * line, 4)}\n" for line in range(8))
    for seed in range(20):
        parts = fim_parts(text, random.Random(seed))
        assert make_document("file", parts).source == text
        several = [Control(REPOSITORY_NAME), "name\n", Control(FILE_SEPARATOR), "a.py\n", *parts]
        several += [Control(FILE_SEPARATOR), "b.py\nlast"]
        found = make_document("repository", several).source
        assert found == f"\nname\n\na.py\n{text}\nb.py\nlast"
    duplicates = Duplicates()
    found = [
        duplicates.fault("file", make_document("file", parts).source)
        for parts in ([text], fim_parts(text, random.Random(0)))
    ]
    assert found == ["", "exact"]
