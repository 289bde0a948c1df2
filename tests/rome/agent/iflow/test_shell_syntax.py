"""Command lines as syntax: what bash really runs is among what was found."""

import os
import random
import shutil
import subprocess
import time

import pytest

from rome.agent.iflow.approval.shell_programs import commands_of
from rome.agent.iflow.approval.shell_syntax import parse

PIECES = [
    "p0", "p1 -a", "p2 'a b'", 'p3 "x y"', "&&", "||", ";", "|", "&", "\n", "(", ")", "{ ", "}",
    "$(", "`", "'", '"', "\\", "\\\n", "#", "<<E\n", "E\n", "!", "if ", "then ", "fi", "do ",
    "done", "while ", "case x in ", "esac", ";;", "x)", " ", "\t", "=", "a=b ", "A=", "$x", "${x}",
    "<(", "> f", "2>&1", "$'\\x70", "p\\1", "p''4", "{p5,p6}", "~", "*", "$((1))", "((", "[[ a ]]",
    "[ a ]", "function f", "f()", "time ", "-", "--", "<<<", "|&", ">|", "&>", "é", "\u00a0",
    "=p3", "for i in a; do ", "in", "p0;p1", "coproc ", "select ", "until ", "elif ", "else ",
    "export ", "declare ", "local ", "unset ", "let ", "test ", "@(", "?(", "$[1]", '$"', "\r",
]  # fmt: skip
ORACLE = """
command_not_found_handle() { local IFS=$'\\001'; printf 'C%s\\002' "$*" >&7; }
export -f command_not_found_handle
PATH=/nonexistent
for line in "$@"; do
  printf 'L\\002' >&7
  ( eval "$line"; wait ) < /dev/null > /dev/null 2>&1
  shopt -s nullglob
  for file in * .[!.]*; do /bin/rm -f -- "$file"; done
  shopt -u nullglob
done
"""


def what_bash_runs(lines: list[str], folder) -> list[list[list[str]]]:
    """Return the words of each command of each line that bash found no program for: all of them."""
    reading, writing = os.pipe()
    script = f"exec 7>&{writing}\n{ORACLE}"
    process = subprocess.Popen(
        [shutil.which("timeout"), "250", "/bin/bash", "--norc", "-c", script, "oracle", *lines],
        pass_fds=[writing],
        env={"PATH": "/nonexistent", "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    os.close(writing)
    with open(reading, "rb") as pipe:
        output = pipe.read().decode(errors="replace")
    process.wait()
    found = []
    for part in output.split("L\x02")[1:]:
        rows = [row for row in part.split("\x02") if row.startswith("C")]
        found.append([row[1:].split("\x01") for row in rows])
    return found


def find_missed(seed: int, count: int, folder) -> tuple[list, int]:
    """Return lines of which bash runs what `commands_of` has not, and how many commands ran."""
    draw = random.Random(seed)
    lines = []
    while len(lines) < count:
        pieces = draw.choices(PIECES, k=draw.randint(2, 9))
        lines.append("".join(piece + draw.choice(["", " ", " "]) for piece in pieces))
    missed = []
    ran = 0
    for line, rows in zip(lines, what_bash_runs(lines, folder), strict=True):
        found = commands_of(line)
        if found.problems or any(one.words and not one.name for one in found.commands):
            continue
        names = {command.name for command in found.commands}
        ran += len(rows)
        missed += [(line, words) for words in rows if words[0] not in names | {"time"}]
    return missed, ran


needs_bash = pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs /bin/bash")


@needs_bash
def test_bash_runs_nothing_that_was_not_found(tmp_path):
    missed, ran = find_missed(1, 300, tmp_path)
    assert missed == []
    assert ran > 15


@needs_bash
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_bash_runs_nothing_that_was_not_found_in_many_lines(tmp_path, seed):
    missed, ran = find_missed(seed, 1000, tmp_path)
    assert missed == []
    assert ran > 40


def names(line: str) -> list[str]:
    return [" ".join(command.texts) for command in commands_of(line).commands if command.words]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a; b && c || d | e & f", ["a", "b", "c", "d", "e", "f"]),
        ('a $(b `c`) <(d) "$(e)"', ["c", "b `c`", "d", "e", 'a $(b `c`) <(d) "$(e)"']),
        ("if a; then b; elif c; then d; else e; fi", ["a", "b", "c", "d", "e"]),
        ("env -i A=b nohup timeout -k 1 5 nice -n 3 x y", ["x y"]),
        ("sudo -u me -- x y", ["x y"]),
        ("find . -type f -exec x {} + -print", ["find . -type f -print", "x {}"]),
        ("bash -euc 'x; y z'", ["x", "y z"]),
        ("bash <<'E'\nx\ny\nE", ["x", "y"]),
        ("cat <<E | sort > f\n$(x)\nE", ["cat", "sort", "x"]),
        ("eval 'a b' ';' c", ["a b", "c"]),
        ("trap 'x y' EXIT", ["x y"]),
        ("'a b' \"c\"'d' \\e $'\\x66'", ["a b cd e f"]),
        ("f() { x; }; f", ["x", "f"]),
        ("for i in $(x); do y; done", ["x", "y"]),
        ("! x; time y", ["x", "y"]),
        ("", []),
        ("# only a comment", []),
    ],
)
def test_commands_of_a_line(line, expected):
    assert names(line) == expected


def test_words_redirects_and_variables():
    line = parse("A=1 B=$x prog 'a b' $y *.c src/*.c >> out 2>&1 < in")
    (command,) = line.commands
    assert command.texts == ("prog", "a b", "$y", "*.c", "src/*.c")
    assert [word.is_certain for word in command.words] == [True, True, False, False, True]
    assert [name for name, _ in command.assignments] == ["A", "B"]
    assert [(one.operator, one.target.text, one.writes) for one in command.redirects] == [
        (">>", "out", True),
        (">&", "1", False),
        ("<", "in", False),
    ]
    assert not command.is_static


@pytest.mark.parametrize(
    "line",
    [
        "'",
        "$(",
        "a b\x00c",
        "a\u2028b",
        "\ud800",
        "f() { x; }",
        "((x=1))",
        "echo ${x@P}",
        "x=(",
        "{",
    ],
)
def test_what_is_not_understood_is_a_problem(line):
    assert parse(line).problems


def test_long_and_deep_lines_take_no_time_and_raise_nothing():
    began = time.process_time()
    for line in ["a" * 70_000, "(" * 5000, "$(" * 2000, "a;" * 4000, "a|" * 9000, "'" * 9999]:
        commands_of(line)
    assert time.process_time() - began < 10
