"""Answers are compared by exact value, whatever way they are written; no text makes it raise, hang
or compute.
"""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.problems.answers import final_answer, is_correct, read_value, written

F = Fraction


@pytest.mark.parametrize(
    "text, value",
    [
        ("5", (F(5),)),
        ("-5.0", (F(-5),)),
        ("+.5", (F(1, 2),)),
        ("1/2", (F(1, 2),)),
        ("0.50", (F(1, 2),)),
        ("\\frac{1}{2}", (F(1, 2),)),
        ("-\\dfrac{3}{4}", (F(-3, 4),)),
        ("50%", (F(1, 2),)),
        ("50\\%", (F(1, 2),)),
        ("$7$", (F(7),)),
        ("1,234", (F(1234),)),
        ("1,234,567.5", (F(2469135, 2),)),
        ("x = 3", (F(3),)),
        ("7.", (F(7),)),
        ("(1, -2)", (F(1), F(-2))),
        ("(1,-2)", (F(1), F(-2))),
        ("1, 2", (F(1), F(2))),
        ("x = 1, y = 1/2", (F(1), F(1, 2))),
        ("\\left(2, 3\\right)", (F(2), F(3))),
        ("(1,234)", (F(1), F(234))),
        ("\u22124", (F(-4),)),
        ("(-3/2)", (F(-3, 2),)),
        ("\\frac12", (F(1, 2),)),
        ("\\frac{1}2", (F(1, 2),)),
        ("-\\frac{ 1 }{ 2 }", (F(-1, 2),)),
        ("\\frac{1,000}{3}", (F(1000, 3),)),
        ("1{,}000", (F(1000),)),
        ("{5}", (F(5),)),
        ("\\$5", (F(5),)),
        ("(1,\\; 2)", (F(1), F(2))),
        ("y = 2, x = 1", (F(1), F(2))),
        ("(y = 2, x = 1)", (F(1), F(2))),
        ("x = 2, x = 1", (F(2), F(1))),
    ],
)
def test_ways_of_writing_a_value(text, value):
    assert read_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "five",
        "1/0",
        "\\frac{0}{0}",
        "1 2",
        "3(2)",
        "0.(3)",
        "2(.5)",
        "(1)(.5)",
        "1\\;000",
        "\\frac123",
        "2\\frac{1}{2}",
        "1e9",
        "nan",
        "inf",
        "1/2/3",
        "x",
        "1 or 2",
        "5 apples",
        "9" * 201,
        "٣",
        "--1",
        "1,,2",
        "1/",
        "{}",
        "__import__('os')",
    ],
)
def test_what_is_no_value(text):
    assert read_value(text) is None


@given(
    st.fractions(max_denominator=10**6),
    st.sampled_from(["{0}/{1}", "\\frac{{{0}}}{{{1}}}", " {0} / {1} "]),
)
def test_a_fraction_is_found_again_as_written(value, form):
    assert read_value(form.format(value.numerator, value.denominator)) == (value,)


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_a_decimal_is_exact(digits, places):
    value = F(digits, 10**places)
    assert read_value(
        f"{digits / 10**places:.{places}f}" if abs(digits) < 10**9 else str(digits)
    ) in ((value,), (F(digits),))


@given(st.lists(st.fractions(max_denominator=1000), min_size=1, max_size=3))
def test_the_written_form_is_read_back(values):
    assert read_value(written(tuple(values))) == tuple(values)


@given(st.text(alphabet="\\frac{}()0123456789/,.-%$x= boxed<answer>\ud800", max_size=40))
def test_any_text_is_read_without_a_fault(text):
    is_correct(text, (F(1),))
    value = read_value(text)
    assert value is None or all(isinstance(one, Fraction) for one in value)


def test_where_an_answer_stands():
    assert final_answer("so \\boxed{1}, no: \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert (
        final_answer("<answer>1</answer> then <answer> 2 </answer>") == "2"
        and final_answer(" 7 ") == "7"
    )
    assert (
        final_answer("<think>\\boxed{1}</think>2") == "2"
        and final_answer("\\boxed{1") is None
        and final_answer("word " * 100) is None
    )
    assert final_answer("\\boxed{" * 100_000) is None and final_answer("<answer>" * 100_000) is None


def test_only_the_last_box_counts_and_a_list_is_not_its_member():
    assert (
        is_correct("\\boxed{2} \\boxed{1}", (F(1),))
        and not is_correct("\\boxed{1} \\boxed{2}", (F(1),))
        and not is_correct("\\boxed{1, 2}", (F(1),))
    )
