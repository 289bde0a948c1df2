"""Tools that read, write and change files, on this machine and in a sandbox."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.iflow.tools.base import ToolError
from rome.agent.iflow.tools.edit import EditTool, MultiEditTool, WriteFileTool
from rome.agent.iflow.tools.files import ListDirectoryTool, ReadFileTool
from rome.agent.iflow.tools.matching import apply_edit
from rome.agent.iflow.tools.text import decode_text, unified_diff
from tests.rome.agent.iflow.places import KINDS, Hand, work

READ = ReadFileTool()
WRITE = WriteFileTool()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_files_are_read_with_numbers_and_by_parts(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await workspace.write("a/b.txt", b"".join(b"line %d\n" % n for n in range(1, 5001)))
        said = (await hand.use(READ, path="a/b.txt", offset=3, limit=2)).output
        assert (
            said
            == "     3\tline 3\n     4\tline 4\n[a/b.txt has 5000 lines; continue with offset 5]"
        )
        whole = (await hand.use(READ, path=f"{workspace.root}/a/b.txt")).output
        assert whole.endswith(
            "  2000\tline 2000\n["
            + f"{workspace.root}/a/b.txt has 5000 lines; continue with offset 2001]"
        )
        assert (
            "so none at offset 5001" in (await hand.use(READ, path="a/b.txt", offset=5001)).output
        )
        await workspace.write("long", b"x" * 5000 + b"\nno end")
        said = (await hand.use(READ, path="long")).output
        assert said == f"     1\t{'x' * 2000} [...]\n     2\tno end"
        await workspace.write("empty", b"")
        assert (await hand.use(READ, path="empty")).output == "(empty is empty)"
        assert "must be at least 1" in (await hand.use(READ, path="empty", offset=0)).output

    work(kind, tmp_path, body)


def test_what_is_no_text_is_named(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await workspace.write("p.png", b"\x89PNG\r\n\x1a\n\0\0")
        await workspace.write("b", bytes(range(256)))
        await workspace.execute("mkdir d; mkfifo f; echo x > Read.me", timeout=9)
        for path, words in {
            "p.png": "image/png of 10 bytes",
            "b": "binary data of 256 bytes",
            "d": "is a directory",
            "f": "no regular file",
            "read.me": "in its folder there are Read.me",
            "no/such": "there is no file no/such, nor its folder",
        }.items():
            said = await hand.use(READ, path=path)
            assert (said.status, words in said.output) == ("error", True), said.output
            assert said.output.count("\n") == 0

    work(kind, tmp_path, body)


def test_a_huge_file_is_read_by_parts(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await workspace.execute("seq 1 1000000 > big", timeout=30)
        said = (await hand.use(READ, path="big", offset=900_000, limit=3)).output
        assert said.startswith(
            "900000\t900000\n900001\t900001\n900002\t900002\n[big has 6888896 bytes"
        )
        assert "offset 900003" in said

    work(kind, tmp_path, body)


def test_a_file_is_read_before_it_is_changed_and_again_after_others_did(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        edit = EditTool()
        await workspace.write("a", b"one\n")
        for tool, arguments in (
            (WRITE, {"content": "x"}),
            (edit, {"old_string": "one", "new_string": "x"}),
        ):
            said = await hand.use(tool, path="a", **arguments)
            assert "was not read yet" in said.output
        await hand.use(READ, path="./a")
        await workspace.execute("echo two >> a", timeout=9)
        assert "has changed since" in (await hand.use(WRITE, path="a", content="x")).output
        assert await workspace.read("a") == b"one\ntwo\n"
        await hand.use(READ, path="a")
        written = await hand.use(WRITE, path="a", content="x\ny")
        assert (written.status, written.changed, written.output) == (
            "ok",
            ("a",),
            "a was written: 2 lines",
        )
        assert "-one\n-two\n+x\n+y\n\\ No newline at end\n" in written.diff
        changed = await hand.use(edit, path="a", old_string="y", new_string="z\n")
        assert changed.output == "a was changed"  # its own writing counts as read
        assert await workspace.read("a") == b"x\nz\n"

    work(kind, tmp_path, body)


def test_a_file_that_changes_while_it_is_read_is_read_again_before_it_is_changed(tmp_path):
    async def body(workspace):
        await workspace.write("a", b"one\n")
        read = workspace.read

        async def read_and_change(path, limit=0):
            data = await read(path, limit)
            await workspace.write("a", b"another\n")
            return data

        workspace.read = read_and_change
        hand = Hand(workspace)
        assert "one" in (await hand.use(READ, path="a")).output
        said = await hand.use(WRITE, path="a", content="x")
        assert "has changed since" in said.output and await read("a") == b"another\n"

    work("host", tmp_path, body)


def test_a_preview_shows_what_would_be_done_and_does_nothing(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        new = {"path": "n/e/w", "content": "hello\n"}
        diff = await WRITE.preview(new, hand.context)
        assert diff == "--- n/e/w\n+++ n/e/w\n@@ -0,0 +1 @@\n+hello\n"
        assert await workspace.stat("n/e/w") is None
        result = await hand.use(WRITE, **new)
        assert (result.diff, result.output) == (diff, "n/e/w was created: 1 lines")
        wrong = {"path": "n/e/w", "old_string": "nothing", "new_string": ""}
        assert await EditTool().preview(wrong, hand.context) == ""

    work(kind, tmp_path, body)


def test_edits_are_made_together_or_not_at_all(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        tool = MultiEditTool()
        await hand.use(WRITE, path="a", content="1\n2\n3\n")
        good = {"old_string": "1", "new_string": "one"}
        follows = {"old_string": "one\n2", "new_string": "one\ntwo"}
        bad = {"old_string": "9", "new_string": "nine"}
        said = await hand.use(tool, path="a", edits=[good, follows, bad])
        assert "edit 3 of 3 cannot be made, so none was" in said.output
        assert await workspace.read("a") == b"1\n2\n3\n"
        said = await hand.use(tool, path="a", edits=[good, follows])
        assert said.output == "a was changed by 2 edits"
        assert await workspace.read("a") == b"one\ntwo\n3\n"
        for edits, words in (
            ([], "edits is empty"),
            ([{"old_string": "1"}], "item 1 of edits of multi_edit needs new_string"),
            (["x"], "item 1 of edits of multi_edit must be of type object"),
            ([good | {"replace_all": "no"}], "replace_all of item 1"),
        ):
            assert words in (await hand.use(tool, path="a", edits=edits)).output

    work(kind, tmp_path, body)


def test_a_failing_edit_says_that_it_failed_before(tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        tool = EditTool()
        wrong = {"path": "a", "old_string": "none", "new_string": "x"}
        await hand.use(WRITE, path="a", content="text\n")
        first = (await hand.use(tool, **wrong)).output
        again = (await hand.use(tool, **wrong)).output
        assert "very same edit failed before" not in first
        assert again.startswith(first) and "very same edit failed before" in again
        await hand.use(WRITE, path="a", content="other text\n")
        assert "failed before" not in (await hand.use(tool, **wrong)).output

    work("host", tmp_path, body)


def test_folders_are_listed(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await workspace.execute(
            "mkdir -p d/sub; echo abc > 'd/a b'; ln -s nowhere d/l; touch d/.h", timeout=9
        )
        said = (await hand.use(ListDirectoryTool(), path="d")).output
        assert said.splitlines() == [".h 0", "a b 4", "l 0", "sub/"]
        assert (await hand.use(ListDirectoryTool(), path="d/sub")).output == "(empty folder)"
        said = await hand.use(ListDirectoryTool(), path="none")
        assert said.status == "error" and "No such file" in said.output

    work(kind, tmp_path, body)


# -- texts


@pytest.mark.parametrize(
    "data, encoding",
    [
        (b"a\r\nb\r\n", "utf-8"),
        (b"\xef\xbb\xbfx\r\ny", "utf-8"),
        ("\ufeffä\r\n€".encode("utf-16-le"), "utf-16-le"),
        ("\ufeffä\n".encode("utf-16-be"), "utf-16-be"),
        (b"caf\xe9\n", "latin-1"),
        (b"mixed\r\nends\n\r", "utf-8"),
    ],
)
def test_encoding_mark_and_ends_of_lines_stay(data, encoding):
    text = decode_text(data, "f")
    assert text.encoding == encoding
    assert text.encode() == data
    assert not text.text.startswith("\ufeff")
    more = text.with_text(text.text + "\nmore\r\n")
    assert decode_text(more.encode(), "f") == more


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.text("a\r\n\ufeffé€\t", max_size=12).map(str.encode)))
def test_any_text_comes_back_byte_for_byte(data):
    try:
        text = decode_text(data, "f")
    except ToolError:
        return
    assert text.encode() == data


def test_a_character_that_the_encoding_lacks_is_an_error():
    with pytest.raises(ToolError, match="latin-1, which has no '€'"):
        decode_text(b"caf\xe9", "f").with_text("€").encode()


def test_a_diff_applies_with_the_numbers_of_the_file(tmp_path):
    before = "".join(f"{n}\n" for n in range(9000))
    after = before.replace("4500\n", "changed\n").replace("4600\n", "")
    diff = unified_diff("f", before, after)
    assert "@@ -4498,7 +4498,7 @@" in diff and "@@ -4598,7 +4598,6 @@" in diff
    assert len(diff) < 400
    assert unified_diff("f", before, before) == ""


# -- matching

FILE = "def f():\n    if x:\n        return 1\n\n\ndef g():\n\tif y:\n\t\treturn 2\n"


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (
            "if x:\n    return 1",
            "if x:\n    return 3\nelse:\n    return 4",
            "    if x:\n        return 3\n    else:\n        return 4\n",
        ),
        (
            "    if y:\n        return 2",
            "    if y:\n        for z in y:\n            return 5",
            "\tif y:\n\t\tfor z in y:\n\t\t\treturn 5\n",
        ),
        ("    if x:   \n        return 1  \n", "    pass\n", "def f():\n    pass\n\n\ndef g"),
        (
            "     2\t    if x:\n     3\t        return 1",
            "     2\t    if z:\n     3\t        return 1",
            "    if z:\n        return 1\n",
        ),
    ],
)
def test_white_space_and_line_numbers_are_forgiven(old, new, expected):
    text, note = apply_edit(FILE, old, new)
    assert expected in text
    assert note


def test_indents_that_contradict_each_other_do_not_match():
    with pytest.raises(ToolError, match="nearest text is"):
        apply_edit("a:\n  b\n    c\n", "a:\n  b\n  c", "x")


def test_an_ambiguous_text_is_told_with_its_lines():
    text = "x = 1\ny\nx = 1\n"
    with pytest.raises(ToolError, match="stands 2 times in the file, at lines 1, 3;"):
        apply_edit(text, "x = 1", "x = 2")
    assert apply_edit(text, "x = 1", "x = 2", replace_all=True)[0] == "x = 2\ny\nx = 2\n"
    with pytest.raises(ToolError, match="at lines 1, 3"):
        apply_edit("  a\n\n    a\n", "\ta\t", "b")


def test_the_nearest_text_is_shown_with_what_differs():
    with pytest.raises(ToolError) as error:
        apply_edit(FILE, "def g():\n    if z:\n        return 2\n", "")
    assert "     6\tdef g():\n     7\t\tif y:" in str(error.value)
    assert "First difference: line 7 has '\\tif y:', old_string '    if z:'." in str(error.value)
    with pytest.raises(ToolError, match="nearest text is:\n     1\tdef f"):
        apply_edit(FILE, "def ff():", "")
    with pytest.raises(ToolError, match="Nothing like it"):
        apply_edit("abc\n", "0123456789", "")


@pytest.mark.parametrize("old, new", [("", "x"), ("a", "a")])
def test_an_edit_that_means_nothing_is_refused(old, new):
    with pytest.raises(ToolError, match="old_string"):
        apply_edit("a", old, new)


LINES = st.lists(st.text("ab \t", max_size=4), min_size=1, max_size=8).map("\n".join)


@settings(max_examples=200, deadline=None)
@given(text=LINES, old=LINES, new=LINES)
def test_an_edit_changes_only_its_place_or_fails(text, old, new):
    try:
        after, note = apply_edit(text, old, new)
    except ToolError:
        return
    if not note:
        assert after == text.replace(old, new, 1) and text.count(old) == 1
    else:
        assert old not in text
        bare = [line.strip() for line in text.split("\n")]
        wanted = [line.strip() for line in old.removesuffix("\n").split("\n")]
        first = next(n for n in range(len(bare)) if bare[n : n + len(wanted)] == wanted)
        assert after.split("\n")[:first] == text.split("\n")[:first]


def test_a_long_file_does_not_take_long():
    text = "".join(f"{n} = value_{n}\n" for n in range(60_000))
    began = time.process_time()
    with pytest.raises(ToolError, match="nearest text is:\n   124\t"):
        apply_edit(text, "123 = value_12x", "x")
    assert time.process_time() - began < 10  # it is 0.2; a comparison of all lines takes minutes
