"""Pages from hostile names: text stays text. Figures that nobody has are none, not 0."""

import html.parser
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rome.evals.report import (
    Table,
    build_results,
    markdown,
    page,
    plain,
    result_tables,
    write_results,
)

TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "table",
    "tr",
    "th",
    "td",
    "p",
}
HOSTILE = (
    "</td><script src=//x.y/z>alert(1)</script><img src=x onerror='a()'>\"& | `a` [b](http://c)"
    " \u202e\x1b[31m\ud800\n| new | row |"
)


def record(task, reward=0.0, ending="failure", **more):
    return {
        "task": task,
        "attempt": 0,
        "agent": "noop",
        "reward": reward,
        "ending": ending,
        "seconds": 1.0,
        "note": task,
        "domain": task,
        "difficulty": task,
        **more,
    }


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=40))
@example(HOSTILE)
def test_a_name_is_text_in_html_and_encodes(name):
    text = page(name, [Table("t", ["a", name], [[name, "x"]])])
    reader, bare = read(text), read(page("", [Table("t", ["a", "b"], [["c", "x"]])]))
    assert reader.tags <= TAGS and reader.attributes == bare.attributes
    assert plain(name).strip() in " ".join(reader.text) or not plain(name).strip()
    text.encode()


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=40))
@example(HOSTILE)
def test_a_name_makes_no_row_column_or_tag_in_markdown(name):
    text = markdown("t", [Table("t", ["a", "b"], [[name, name]])])
    text.encode()
    assert len(text.splitlines()) == len(
        markdown("t", [Table("t", ["a", "b"], [["c", "d"]])]).splitlines()
    )
    assert text.splitlines()[-1].count("|") == 3
    assert not set("<>`") & set(text)


def test_the_page_forbids_and_needs_everything_from_outside():
    text = page("t", [Table("t", [""], [[HOSTILE]])])
    assert (
        "default-src 'none'" in text and not {"script", "img", "link", "iframe"} & read(text).tags
    )
    assert not [value for name, value in read(text).attributes if name in ("src", "href")]


@pytest.mark.parametrize("task", [HOSTILE, "plain"])
def test_the_files_say_the_same(tmp_path, task):
    records = [
        record(task),
        record("b", 1.0, "success", tokens={"prompt": 5, "completion": 2}),
        record("c", None, "infra_engine"),
    ]
    results = build_results({"dataset": "d", "agent": "noop", "seed": 0}, records, 1)
    write_results(tmp_path, results)
    read_back = json.loads((tmp_path / "results.json").read_text())
    assert (
        read_back["tasks"][0]["task"] == task
        and read_back["pass_at_1"] == read_back["mean_reward"] == 0.5
    )
    assert read_back["by_ending"] == {"failure": 1, "infra_engine": 1, "success": 1}
    assert read_back["cost"]["tokens"] == {"prompt": 5, "completion": 2}
    for name in ("report.md", "report.html"):
        assert "0.500" in (tmp_path / name).read_text()


def test_without_an_attempt_that_counts_there_is_no_metric():
    results = build_results(
        {"dataset": "d", "agent": "noop", "seed": 0}, [record("a", None, "infra_sandbox")], 1
    )
    assert results["mean_reward"] is None and results["pass_at_1"] is None
    metrics = dict(
        (row[0], row[1])
        for row in next(rows for title, _, rows in result_tables(results) if title == "Metrics")
    )
    assert metrics == {"mean reward": "none", "pass@1": "none"}
