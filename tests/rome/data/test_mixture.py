"""The grammar of mixtures."""

import pytest

from rome.data.mixture import Part, parse_mixture


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data", [Part("data", None)]),
        (" a/b c.jsonl ", [Part("a/b c.jsonl", None)]),
        ("a, b.parquet + c", [Part("a", None), Part("b.parquet", None), Part("c", None)]),
        ("c++/x+y", [Part("c++/x+y", None)]),
        ("3*a + 1*b", [Part("a", 0.75), Part("b", 0.25)]),
        (".5*a,0.5 * b", [Part("a", 0.5), Part("b", 0.5)]),
        ("2e-1*a + 0.8*b", [Part("a", 0.2), Part("b", 0.8)]),
        ("7*a", [Part("a", 1.0)]),
        ("0.7*terminal:wide + 0.3*shop", [Part("terminal:wide", 0.7), Part("shop", 0.3)]),
    ],
)
def test_a_mixture_is_its_parts(text, parts):
    found = parse_mixture(text)
    assert [part.name for part in found] == [part.name for part in parts]
    weights = [(part.weight, right.weight) for part, right in zip(found, parts, strict=True)]
    assert all(got == want or got == pytest.approx(want) for got, want in weights)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty part"),
        ("a + ", "empty part"),
        ("a,,b", "empty part"),
        ("0.5*", "empty part"),
        ("0.5*a + b", "some of its parts only"),
        ("0*a + 1*b", "no number above 0"),
        ("1e999*a", "no number above 0"),
        ("1-2*a", "no number above 0"),
    ],
)
def test_what_is_no_mixture_is_refused_with_the_grammar(text, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        parse_mixture(text)
    assert '"0.7*A + 0.3*B"' in str(error.value)
