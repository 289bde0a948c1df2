"""The judge's reading of reports: only what the runner signed, in order and complete, counts."""

import hashlib
import hmac
import inspect
import json
import os
import re

import pytest
from _pytest.config import findpaths
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks.judge import inside, judge_files
from envs.tasks.judge.runner import reporter

KEY = b"k" * 32
CONTROLS = {"c::good": "passed", "c::bad": "failed"}


def sent(*reports):
    """What the runner writes for these."""
    read, write = os.pipe()
    report = reporter(KEY, write)
    for name, outcome in reports:
        report(name, outcome)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read()


REPORTS = [("a::x", "passed"), ("b::y[1 2]", "failed"), (None, "end")]


def test_what_the_runner_reports_is_read_as_it_was():
    assert inside.read_reports(sent(*REPORTS), KEY) == (REPORTS[:2], "")


@pytest.mark.parametrize(
    "data, fault",
    [
        (sent(*REPORTS)[:-1], "before they were done"),
        (sent(*REPORTS[:2]), "before they were done"),
        (b"", "before they were done"),
        (b"PASSED a::x\n" + sent(*REPORTS), "report 0 is not the runner's"),
        (sent(*REPORTS) + b"more\n", "reports follow"),
        (sent(*REPORTS) + b"half", "reports follow"),
        (b"".join(sent(*REPORTS).splitlines(True)[1:]), "out of order"),
        (sent(REPORTS[0]) * 2, "report 1 is out of order"),
        (sent(*REPORTS).replace(b"failed", b"passed"), "report 1 is not the runner's"),
    ],
)
def test_what_is_changed_cut_off_repeated_or_added_counts_for_nothing(data, fault):
    assert inside.read_reports(data, KEY)[0] == [] and fault in inside.read_reports(data, KEY)[1]


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_bytes_from_anywhere_in_the_pipe_are_a_fault_and_no_crash(noise, place):
    whole = sent(*REPORTS)
    found, fault = inside.read_reports(whole[:place] + noise + whole[place:], KEY)
    assert (found, fault) == (REPORTS[:2], "") if not noise else found == [] and fault


def test_a_line_that_is_signed_with_another_key_is_not_the_runners():
    body = json.dumps([0, "a", "passed"]).encode()
    assert (
        "not the runner's"
        in inside.read_reports(
            hmac.new(b"other", body, hashlib.sha256).hexdigest().encode() + b" " + body + b"\n", KEY
        )[1]
    )


GOOD = [("a::x", "passed"), ("b::y[1 2]", "passed"), ("c::good", "passed"), ("c::bad", "failed")]


@pytest.mark.parametrize(
    "reports, tests, sound",
    [
        (GOOD, ["a::x", "b::y[1 2]"], True),
        (GOOD, ["b::y[1"], True),
        (GOOD, ["a::z"], False),
        (GOOD[1:], ["a::x"], False),
        ([*GOOD, ("a::x", "failed")], ["a::x"], False),
        (GOOD[:3], ["a::x"], False),
        ([*GOOD[:3], ("c::bad", "passed")], ["a::x"], False),
        ([*GOOD, ("b::y[1 3]", "failed")], ["b::y[1"], False),
        ([("a::x", "skipped"), *GOOD[1:]], ["a::x"], False),
    ],
)
def test_every_test_must_be_run_and_pass_and_the_controls_must_end_as_they_must(
    reports, tests, sound
):
    assert (inside.judge(reports, tests, CONTROLS) == []) == sound


def test_a_framework_that_is_none_is_named():
    with pytest.raises(ValueError, match="nose"):
        judge_files("nose", ["a"], {}, targets=["."], control_folder=".")


def test_every_file_that_pytest_would_read_its_settings_from_alone_is_removed(tmp_path):
    shared = {"pyproject.toml", "tox.ini", "setup.cfg"}  # other programs read these, too
    text = inspect.getsource(findpaths)
    names = set(re.findall(r"[\"'](\.?\w+\.(?:ini|toml|cfg))[\"']", text))
    assert "pytest.ini" in names
    for name in names:
        (tmp_path / name).write_text("")
    inside.remove_settings(tmp_path, set())
    assert {path.name for path in tmp_path.iterdir()} <= shared
