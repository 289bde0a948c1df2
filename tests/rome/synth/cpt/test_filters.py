"""Which documents repeat others."""

from rome.synth.cpt.filters import Duplicates


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
