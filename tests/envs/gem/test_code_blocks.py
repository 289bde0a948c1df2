"""Code blocks are found whole: fences in fences, here-documents and strings do not cut them."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.gem.code_blocks import fenced_blocks, tagged_blocks
from envs.gem.tools import SearchTool, ShellTool
from envs.gem.tools.search import BM25Index

README = """\
cat > README.md <<'EOF'
# Title
```python
print(1)
```
The end.
EOF
wc -l README.md"""
PROGRAM = '''\
text = """
```
inner
```
"""
print(text)'''
# parts of shell scripts, each of which is whole
PARTS = st.lists(
    st.sampled_from(
        [
            "ls",
            "echo 'use ``` here'",
            "cat > f <<'EOF'\n```\ncode\n```\nEOF",
            "cat <<-END | sort\n\t```sh\n\tls\n\t```\n\tEND",
            "echo $((1 << 3))",
            'cat <<< "x"',
        ]
    ),
    min_size=1,
    max_size=5,
).map("\n".join)


@given(script=PARTS, before=st.sampled_from(["", "So:\n", "I look. "]), crlf=st.booleans())
def test_a_script_is_read_back_whole_and_what_follows_stays_outside(script, before, crlf):
    text = f"{before}```bash\n{script}\n```\nThen I am done."
    if crlf:
        text = text.replace("\n", "\r\n")
    (block,) = fenced_blocks(text)
    assert block.content == f"{script}\n"
    assert text[block.end :].split() == ["Then", "I", "am", "done."]


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (f"```bash\n{README}\n```", [README + "\n"]),
        (f"````bash\n```\n{README}\n```\n````", [f"```\n{README}\n```\n"]),
        (f"```python\n{PROGRAM}\n```\nwords", [PROGRAM + "\n"]),
        ('```python\nx = 1  # """\ny = "\'\'\'"\n```\n"""', ['x = 1  # """\ny = "\'\'\'"\n']),
        ('```python\ntext = """open\n```\nwords', ['text = """open\n']),
        ("```bash\ncat > f <<EOF\nhello\n```\nwords", ["cat > f <<EOF\nhello\n"]),
        ("```sh\nls\n``` and ```sh\npwd\n```", ["ls\n", "pwd\n"]),
        ("```python\nprint(1)```\nthen\n```python\nprint(2)\n```", ["print(1)", "print(2)\n"]),
        ("```python print(1)``` inline", ["print(1)"]),
        ("use ``` to fence\n```sh\nls\n```", ["ls\n"]),
        ("```sh\nls", []),
        ("``````", []),
    ],
)
def test_blocks_end_where_their_code_ends(text, contents):
    assert [block.content for block in fenced_blocks(text)] == contents


def test_a_tag_within_the_code_does_not_end_it():
    text = "<python>print('</python>')</python> and <python>2</python> </bash>"
    assert [block.content for block in tagged_blocks(text, "python")] == ["print('</python>')", "2"]


def test_a_here_document_with_fences_is_written_whole(tmp_path):
    (block,) = fenced_blocks(f"I write it.\n```bash\n{README}\n```\n")
    subprocess.run(["bash", "-c", block.content], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text().count("\n") == 5


def test_tools_run_nothing_that_was_only_thought():
    tools = [ShellTool(), SearchTool(BM25Index([("title", "text")]))]
    for draft in ("<bash>rm -r x</bash>", "```bash\nrm -r x\n```", "<search>x</search>"):
        for turn in (f"<think>{draft}</think>done", f"{draft}</think>done", f"<think>{draft}"):
            assert [tool.execute_action(turn)[0] for tool in tools] == [False, False]


@pytest.mark.parametrize("piece", ["```python\n", "```sh\ncat <<E\n", "```\n'''", "x```", "```a "])
def test_a_megabyte_of_openings_is_read_in_linear_time(piece):
    for text in (piece * 100_000, "\n".join("`" * length + "sh" for length in range(900, 2, -1))):
        assert isinstance(fenced_blocks(text), list)  # the suite's time limit is the assertion
