"""Packages of other languages are recorded, broken and proven; how their calls are drawn."""

import asyncio
import json
import random
import shutil
import subprocess
import sys

import pytest

from envs.tasks.harbor.errors import TaskError
from envs.tasks.made import calls, packages, write_draft
from envs.tasks.made.packages import language_of, package_drafts, read_package, record_package
from envs.tasks.made.prove import judge_programs
from envs.tasks.repair.mutate import Edit
from tests.envs.tasks.made.test_verify import play

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
    """Record few tests, try few mutants, and take bugs that few others are near to."""
    monkeypatch.setattr(packages, "MAX_TESTS", 40)
    monkeypatch.setattr(packages, "MAX_TRIED", 6)
    monkeypatch.setattr(packages, "MIN_NOTICED", 0.0)
    monkeypatch.setattr(packages, "MIN_TRIED_NEAR", 1)


def prove_one(folder, program):
    """Return the recording and a task of a package; the package passes it, the bug does not.

    The task is graded as an agent's work is, too.
    """
    recording = asyncio.run(record_package(folder, 0, "best_available"))
    drafts = asyncio.run(package_drafts(recording, 1, 0, "best_available"))
    assert len(drafts) == 1 and drafts[0].program == program
    draft = drafts[0]
    whole, broken, empty = asyncio.run(
        judge_programs(draft, [draft.oracle, draft.files[program], ""])
    )
    assert whole == [] and broken != [] and empty != []
    task = folder.parent / "task"
    write_draft(draft, task)
    mend = f"cat > /app/{program} << 'END'\n{draft.oracle}\nEND"
    assert asyncio.run(play(task, mend)) == 1.0
    assert asyncio.run(play(task, "true")) == 0.0
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


PYTHON = """\
class BoxError(Exception):
    def __init__(self, width, why):
        super().__init__(why)
        self.width = width


class Box:
    __slots__ = ("width", "_secret")

    def __init__(self, width: int):
        if width < 0:
            raise BoxError(width, "negative")
        self.width = width
        self._secret = object()

    def grow(self, by: int):
        self.width += by


def pair(width: int):
    return {"boxes": [Box(width), Box(1)]}
"""


def record(folder, *arguments, given=""):
    """Run the recorder of Python packages on a package that these tests wrote themselves."""
    for name in ("record.py", "calls.py"):
        shutil.copy(packages.HERE / name, folder)
    command = [sys.executable, "-B", "record.py", *arguments]
    done = subprocess.run(
        command, cwd=folder, input=given, capture_output=True, text=True, check=True, timeout=120
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_objects_hold_is_recorded_and_compared(tmp_path):
    (tmp_path / "boxes").mkdir()
    file = tmp_path / "boxes" / "__init__.py"
    file.write_text(PYTHON)
    tests = record(tmp_path, "record", "boxes", "0", "40")
    shown = {test["statements"][0]: test["outcome"][0] for test in tests}
    assert shown["Box(7)"] == [1, "<boxes.Box object> with .width=7"]
    assert [0, "BoxError with .width=-1"] in shown.values()
    assert any(
        "['boxes'][0].width=" in text and "[1].width=1" in text for _, text in shown.values()
    )
    grown = [text for statement, (_, text) in shown.items() if ".grow(" in statement]
    assert any(text.startswith("[None, <boxes.Box object>] with [1].width=") for text in grown)
    assert "._secret=" not in str(shown)
    asked = "".join(json.dumps(test) + "\n" for test in tests)
    broken = tmp_path / "broken.py"
    for old, new in (("+= by", "-= by"), ("self.width = width\n        self._", "self._")):
        broken.write_text(PYTHON.replace(old, new))
        outcomes = record(tmp_path, "run", "broken.py", "boxes/__init__.py", given=asked)
        assert outcomes != [test["outcome"] for test in tests], new


def test_what_cannot_be_shown_does_not_end_the_recording(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "__init__.py").write_text(
        "class Odd:\n    def __repr__(self):\n        raise RuntimeError\n\n\n"
        "class OddError(Exception):\n    def __init__(self):\n        self.part = Odd()\n\n\n"
        "def fail(n: int):\n    raise OddError\n\n\ndef double(n: int):\n    return 2 * n\n"
    )
    tests = record(tmp_path, "record", "odd", "0", "20")
    shown = {test["statements"][0]: test["outcome"][0] for test in tests}
    assert [0, "OddError with .part=Odd"] in shown.values()
    assert any(statement.startswith("double(") for statement in shown)


def test_bugs_are_put_only_where_tests_notice_their_neighbours():
    text = "\n".join(f"line {number}" for number in range(100))
    places = [text.index(f"line {number}") for number in (1, 2, 3, 4, 50, 51, 52, 53, 54)]
    edits = [Edit(place, place + 4, "LINE", "kind") for place in places]
    detected, missed = [*edits[:4], *edits[5:]], edits[4:5]
    sound = [one for one in detected if packages._is_well_tested(text, one, detected, missed)]
    assert sound == edits[:4], "of five edits about line 50 one is not noticed"
    few = edits[:3]
    assert not any(packages._is_well_tested(text, one, few, []) for one in few)


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


def test_a_target_that_does_not_end_in_time_is_drawn_twice_at_most():
    asked = []

    def watch(module, statements):
        asked.append(statements[0])
        if statements[0].startswith("forever"):
            return None, None
        return watch_square(module, statements)

    values = [str(number) for number in range(50)]
    targets = [
        calls.Target("p", form, [("", values, False)]) for form in ("forever({})", "square({})")
    ]
    tests = list(calls.draw_tests((), targets, watch, random.Random(0), 20))
    assert len(tests) == 20 and all("square" in test["statements"][0] for test in tests)
    assert sum(text.startswith("forever") for text in asked) == calls.MAX_SLOW


def test_named_arguments_follow_the_others():
    target = calls.Target("p", "f({})", [("a", ["1"], True), ("", ["x == 2"], False)])
    drawn = [["a=1", "x == 2"]]
    assert target.text(calls.in_order(drawn)) == "f(x == 2, a=1)"
