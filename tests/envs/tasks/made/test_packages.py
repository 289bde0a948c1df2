"""Packages of other languages are recorded, broken and proven; how their calls are drawn."""

import asyncio
import json
import random
import shutil

import pytest

from envs.tasks.harbor.errors import TaskError
from envs.tasks.made import calls, packages
from envs.tasks.made.packages import language_of, package_drafts, read_package, record_package
from envs.tasks.made.prove import judge_programs

SHELL = """\
# Text and numbers.
trim() {
  local text="$1"
  text="${text#"${text%%[! ]*}"}"
  printf '%s\\n' "${text%"${text##*[! ]}"}"
}

sum_of() {
  local total=0 number
  while read -r number; do
    if [ "$number" -gt 0 ] 2> /dev/null; then
      total=$((total + number))
    fi
  done
  echo "$total"
}
"""
JAVASCRIPT = """\
class Box {
  constructor(width, height) {
    if (!(width >= 0)) throw new RangeError("width");
    this.width = width;
    this.height = height || 2;
  }
  get area() {
    return this.width * this.height;
  }
  grow(by) {
    return new Box(this.width + by, this.height + by).area;
  }
}
function largest(numbers) {
  let best = null;
  for (const one of Array.from(numbers)) {
    if (best === null || one > best) best = one;
  }
  return best;
}
module.exports = { Box, largest };
"""


@pytest.fixture
def few(monkeypatch):
    """Record few tests and try few mutants."""
    monkeypatch.setattr(packages, "MAX_TESTS", 40)
    monkeypatch.setattr(packages, "MAX_TRIED", 6)


def prove_one(folder, program):
    """Return the recording and a task of a package; the package passes it, the bug does not."""
    recording = asyncio.run(record_package(folder, 0, "best_available"))
    drafts = asyncio.run(package_drafts(recording, 1, 0, "best_available"))
    assert len(drafts) == 1 and drafts[0].program == program
    draft = drafts[0]
    whole, broken, empty = asyncio.run(
        judge_programs(draft, [draft.oracle, draft.files[program], ""])
    )
    assert whole == [] and broken != [] and empty != []
    return recording, draft


@pytest.mark.slow
def test_shell_functions_are_recorded_broken_and_proven(tmp_path, few):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "texts.sh").write_text(SHELL)
    (folder / "notes.md").write_text("no script")
    recording, draft = prove_one(folder, "texts/texts.sh")
    assert recording.language == draft.language == "shell"
    assert list(recording.files) == ["texts/texts.sh"]
    assert {"trim", "sum_of"} == {
        name
        for test in recording.tests
        for name in ("trim", "sum_of")
        if f"| {name}" in test["statements"][0]
    }
    bodies = {*range(3, 6), *range(9, 16)}
    assert all(set(test["lines"]["texts/texts.sh"]) & bodies for test in recording.tests)
    assert "folder of shell scripts" in draft.instruction


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_modules_are_recorded_broken_and_proven(tmp_path, few):
    folder = tmp_path / "boxes"
    (folder / "lib").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "boxes", "main": "lib/box.js"}))
    (folder / "lib" / "box.js").write_text(JAVASCRIPT)
    recording, draft = prove_one(folder, "boxes/lib/box.js")
    assert recording.language == draft.language == "javascript"
    statements = [test["statements"][0] for test in recording.tests]
    for part in ("new m.Box(", ").area", ").grow(", "m.largest("):
        assert any(part in statement for statement in statements)
    failing = [test for test in recording.tests if not test["outcome"][0][0]]
    assert any(test["outcome"] == [[0, "RangeError"]] for test in failing)
    constructor = {4, 5}
    grown = [test for test in recording.tests if ").grow(" in test["statements"][0]]
    assert all(set(test["lines"]["boxes/lib/box.js"]) & constructor for test in grown)


def test_a_folder_of_no_known_language_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(TaskError, match="a package of Python, JavaScript or shell"):
        language_of(tmp_path)
    (tmp_path / "run").write_text("#!/bin/bash\necho\n")
    assert list(read_package(tmp_path)) == [f"{tmp_path.name}/run"]


def watch_square(module, statements):
    """Return the outcome of `square(N)` or `fail(N)`; the lines depend on the sign of N."""
    name, _, text = statements[0].rstrip(")").partition("(")
    number = int(text or 0)
    lines = {"p.py": [1, 2 if number < 0 else 3]}
    return ([[0, "ValueError"]] if name == "fail" else [[1, str(number**2)]]), lines


def test_drawn_calls_are_varied_bounded_and_repeatable():
    values = [str(number) for number in range(-9, 10)]
    targets = [
        calls.Target("p", "square({})", [("", values, False)]),
        calls.Target("p", "fail({})", [("", values, False)]),
    ]

    def draw():
        for target in targets:
            target.kept, target.shown = 0, {}
        examples = [("p", ["square(100)"]), ("p", ["fail(1)"])]
        return list(calls.draw_tests(examples, targets, watch_square, random.Random(0), 20))

    tests = draw()
    assert tests == draw()
    assert tests[0]["statements"] == ["square(100)"]
    texts = [test["statements"][0] for test in tests]
    assert len(set(texts)) == len(texts) <= 20
    failing = [test for test in tests if test["statements"][0].startswith("fail")]
    assert len(failing) <= 2, "a call that only fails must run new lines"
    shown = [str(test["outcome"]) for test in tests]
    assert max(map(shown.count, shown)) <= calls.MAX_ALIKE + 2


def test_named_arguments_follow_the_others():
    target = calls.Target("p", "f({})", [("a", ["1"], True), ("", ["x == 2"], False)])
    drawn = [["a=1", "x == 2"]]
    assert target.text(calls.in_order(drawn)) == "f(x == 2, a=1)"
