"""glob and search: what is found, what is ignored as git ignores it, and bounds."""

import pathlib
import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.iflow.tools import walk
from rome.agent.iflow.tools.search import GlobTool, SearchTool
from tests.rome.agent.iflow.places import KINDS, Hand, work

GLOB = GlobTool()
SEARCH = SearchTool()
FILES = {
    "src/a.py": b"import os\nneedle one\n",
    "src/deep/b.py": b"Needle two\r\n",
    "src/b.ts": b"x\nneedle\ny\nz\nneedle\n",
    "README.md": b"a needle here\n",
    "build/out.py": b"needle\n",
    "src/keep.log": b"needle\n",
    "src/other.log": b"needle\n",
    "secret/key.py": b"needle\n",
    "data.bin": b"needle\0\n",
    ".hidden.py": b"needle\n",
    ".git/config": b"needle\n",
    ".gitignore": b"build/\n*.log\n!keep.log\n",
    ".iflowignore": b"/secret\n",
}


async def fill(workspace):
    lines = []
    for path, content in FILES.items():
        escaped = "".join(f"\\x{byte:02x}" for byte in content)
        lines.append(f"mkdir -p $(dirname {path}); printf '{escaped}' > {path}")
    await workspace.execute("\n".join(lines), timeout=30)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_files_are_found_by_name(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await fill(workspace)
        for pattern, expected in {
            "*.py": [".hidden.py", "src/a.py", "src/deep/b.py"],
            "src/*.{py,ts}": ["src/a.py", "src/b.ts"],
            "**/deep/**": ["src/deep/b.py"],
            "src/**/*.py": ["src/a.py", "src/deep/b.py"],
            "*.log": ["src/keep.log"],
            "/README.*": ["README.md"],
            f"{workspace.root}/src/a.py": ["src/a.py"],
        }.items():
            assert (await hand.use(GLOB, pattern=pattern)).output.split("\n") == expected, pattern
        assert (await hand.use(GLOB, pattern="b.*", path="src")).output == "src/b.ts\nsrc/deep/b.py"
        assert (await hand.use(GLOB, pattern="*.rs")).output == "no file fits *.rs"
        assert "No such file" in (await hand.use(GLOB, pattern="*", path="none")).output
        await workspace.execute("cd src; for n in $(seq 600); do : > n$n.txt; done", timeout=30)
        many = (await hand.use(GLOB, pattern="*.txt")).output.split("\n")
        assert len(many) == 501 and "more than 500 files" in many[-1]

    work(kind, tmp_path, body)


async def look_for_needles(workspace):
    hand = Hand(workspace)
    await fill(workspace)
    said = (await hand.use(SEARCH, pattern="needle")).output.split("\n")
    assert said == [
        ".hidden.py:1:needle",
        "README.md:1:a needle here",
        "src/a.py:2:needle one",
        "src/b.ts:2:needle",
        "src/b.ts:5:needle",
        "src/keep.log:1:needle",
    ]
    said = (await hand.use(SEARCH, pattern="^N", ignore_case=True, path="src/deep")).output
    assert said == "src/deep/b.py:1:Needle two"
    said = (await hand.use(SEARCH, pattern="needle", glob="*.ts", context=1)).output
    assert said == "src/b.ts-1-x\nsrc/b.ts:2:needle\nsrc/b.ts-3-y\nsrc/b.ts-4-z\nsrc/b.ts:5:needle"
    assert (
        await hand.use(SEARCH, pattern="needle", path="src/a.py")
    ).output == "src/a.py:2:needle one"
    said = (await hand.use(SEARCH, pattern="needle", files_only=True)).output
    assert said == ".hidden.py\nREADME.md\nsrc/a.py\nsrc/b.ts\nsrc/keep.log"
    assert (await hand.use(SEARCH, pattern="no[tn]e")).output == "no line fits no[tn]e"
    wrong = await hand.use(SEARCH, pattern="(")
    assert wrong.status == "error" and wrong.output
    missing = await hand.use(SEARCH, pattern="x", path="none")
    assert missing.status == "error" and "No such file" in missing.output
    await workspace.write("many", b"needle and hay\n" * 5000 + b"needle" * 9999)
    said = (await hand.use(SEARCH, pattern="needle", path="many")).output.split("\n")
    assert len(said) == 201 and "more; narrow" in said[-1]


def test_lines_are_found(kind, tmp_path):
    work(kind, tmp_path, look_for_needles)


def test_odd_names_and_bytes_are_no_trouble(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await workspace.write("a\nb: 'c' $x.txt", "ünï needle".encode())
        await workspace.write("l.txt", b"\xff\xfe needle \xff")
        await workspace.execute("mkfifo pipe; ln -s pipe link; ln -s / rootlink", timeout=9)
        said = (await hand.use(SEARCH, pattern="n. needle|needle .", glob="*.txt")).output
        assert "a\nb: 'c' $x.txt:1:ünï needle" in said and "l.txt:1:" in said
        assert (await hand.use(GLOB, pattern="*.txt")).output == "a\nb: 'c' $x.txt\nl.txt"

    work(kind, tmp_path, body)


def test_a_pattern_that_takes_for_ever_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("rome.agent.iflow.tools.walking.SECONDS", 0.7)

    async def body(workspace):
        await workspace.write("a", b"a" * 40 + b"!")
        said = await Hand(workspace).use(SEARCH, pattern="(a+)+$", glob="a")
        assert said.status == "error" and "more than 0.7 seconds" in said.output

    work("host", tmp_path, body)


def test_a_place_outside_the_project_has_its_own_rules(tmp_path):
    async def body(workspace):
        await workspace.write(".gitignore", b"*.txt\n")
        await workspace.write("../other/a.txt", b"needle\n")
        said = await Hand(workspace).use(SEARCH, pattern="needle", path="../other", glob="*")
        assert said.output == f"{tmp_path}/other/a.txt:1:needle"

    work("host", tmp_path, body)


NAME = st.sampled_from(["a", "b", "ab", "a.c", "b.c", "[a]", "x y"])
PATTERN = st.one_of(
    st.lists(
        NAME | st.sampled_from(["*", "**", "*.c", "?", "a*", "[ab]", "[!a]*"]),
        min_size=1,
        max_size=3,
    )
    .map("/".join)
    .flatmap(lambda text: st.sampled_from([text, f"/{text}", f"{text}/", f"!{text}", f"{text} "])),
    st.sampled_from(
        ["", "# a", "\\#a", "\\!a", "a\\ ", "**", "/**", "a/**", "**/a", "*\\", "[", "[]a]"]
    ),
)


@settings(max_examples=15, deadline=None)
@given(
    paths=st.lists(st.lists(NAME, min_size=1, max_size=3).map("/".join), min_size=1, max_size=8),
    rules=st.dictionaries(
        st.sampled_from(["", "a/", "b/"]), st.lists(PATTERN, max_size=4), max_size=2
    ),
)
def test_what_is_ignored_is_what_git_ignores(paths, rules):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for path in paths:
            if not any((root / above).is_file() for above in pathlib.PurePath(path).parents):
                place = root / path
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    place.write_text("")
        for below, lines in rules.items():
            if (root / below).is_dir():
                (root / below / ".gitignore").write_text("\n".join(lines))
        git = ["git", "-C", folder]
        subprocess.run([*git, "init", "-q"], check=True)
        listed = subprocess.run(
            [*git, "ls-files", "-z", "--others", "--exclude-standard"],
            capture_output=True,
            check=True,
        )
        expected = sorted(listed.stdout.decode().split("\0")[:-1])
        assert sorted(walk.walk(folder, folder)) == expected
