"""Verdicts by pytest's short summary, as the parser of Terminal-Bench 1 reads them."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.tasks.harbor import RewardError, load_task
from envs.tasks.harbor.grade import terminal_bench_1_passed
from tests.envs.tasks.harbor.conftest import tb1
from tests.envs.tasks.harbor.playing import play

HEADING = "=========================== short test summary info ===========================\n"


# The rule is that of terminal_bench 0.2.18: parsers/pytest_parser.py, and _is_resolved of
# harness/harness.py. What it says of each text was taken from there.
@pytest.mark.parametrize(
    ("output", "passed"),
    [
        (f"{HEADING}PASSED t.py::a\nPASSED t.py::b\n=== 2 passed in 0.01s ===\n", True),
        (f"{HEADING}PASSED t.py::a\nFAILED t.py::b - assert 1 == 2\n", False),
        (f"{HEADING}PASSED t.py::a\nERROR t.py::b - boom\n", False),
        (f"{HEADING}SKIPPED [1] t.py:3: no network\nPASSED t.py::a\n", True),
        (f"{HEADING}XFAIL t.py::a - known\n", True),
        (f"{HEADING}XPASS t.py::a\n", False),
        (f"{HEADING}FAILED t.py::a - x\nPASSED other.py::a\n", True),
        (f"{HEADING}FAILED t.py::a[- - ] - x\nPASSED t.py::b\n", False),
        (f"=Short Test Summary Info=\nPASSED a::b\n{HEADING}FAILED a::c\n", False),
        (
            f"\x1b[36m\x1b[1m{HEADING.strip()}\x1b[0m\n"
            "\x1b[32mPASSED\x1b[0m t.py::\x1b[1ma\x1b[0m\n",
            True,
        ),
        (f"FAILED before\n{HEADING}PASSED: t.py::a\nPASSED\nnoise\n", True),
    ],
)
def test_outcomes_are_read_as_terminal_bench_reads_them(output, passed):
    assert terminal_bench_1_passed(output) is passed


@pytest.mark.parametrize("output", ["", "2 passed\n", f"{HEADING}no test\n"])
def test_without_a_test_in_a_summary_there_is_no_verdict(output):
    with pytest.raises(RewardError, match="summary"):
        terminal_bench_1_passed(output)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["PASSED", "FAILED", "SKIPPED", "XFAIL", "XPASS", "ERROR"]),
            st.sampled_from(["a", "b", "c", "d[x]"]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_the_last_outcome_of_each_test_counts(outcomes, coloured):
    paint = "\x1b[31m{}\x1b[0m" if coloured else "{}"
    rows = [f"{paint.format(status)} t.py::{name}" for status, name in outcomes]
    last = {name: status for status, name in outcomes}
    expected = all(status in ("PASSED", "SKIPPED", "XFAIL") for status in last.values())
    assert terminal_bench_1_passed(HEADING + "\n".join(rows)) is expected


def test_a_summary_that_is_longer_than_an_output_counts_and_the_exit_code_does_not(tmp_path, run):
    rows = 3000
    script = (
        f"echo '{HEADING.strip()}'\n"
        f'for i in $(seq {rows}); do echo "PASSED tests/test_outputs.py::test_row[$i]"; done\n'
    )
    task = load_task(tb1(tmp_path / "a", f"{script}exit 1\n"))
    assert run(play(task))[0] == 1.0
    one_fails = script.replace("done\n", "done\n", 1).replace(
        "seq 3000); do", "seq 3000); do [ $i = 7 ] && echo 'FAILED a::x';"
    )
    assert run(play(load_task(tb1(tmp_path / "b", one_fails))))[0] == 0.0


def test_nothing_that_the_tests_print_stands_for_the_summary(tmp_path, run):
    forged = gzip.compress(f"{HEADING}PASSED a::b\n".encode()).hex()
    script = f"echo {forged}\nprintf 'x'\nexit 0\n"
    reward, info = run(play(load_task(tb1(tmp_path / "task", script))))
    assert reward == 0.0 and "short test summary is not in the output" in info["note"]
