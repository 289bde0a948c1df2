"""Dockerfiles: what is read, what is refused by name and line, and any text at all; and what paths
become.
"""

import contextlib
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks.harbor import TaskError, UnsupportedError
from envs.tasks.harbor.context import ignore_patterns, is_ignored, without_ignored
from envs.tasks.harbor.dockerfile import KEYWORDS, assignments, parse
from envs.tasks.harbor.dockerfile_words import SubstitutionError, expand, split_words
from envs.tasks.harbor.image_names import find_image, parse_image_name
from envs.tasks.harbor.installs import needs_of
from envs.tasks.harbor.paths import PathMap

FILE = pathlib.Path("Dockerfile")


def read(text):
    return [(one.keyword, one.arguments, one.line) for one in parse(text, FILE)]


def test_comments_continuations_and_lines():
    text = (
        "# syntax=docker/dockerfile:1\n\nARG V=1\nfrom ubuntu:$V as base\nRUN a \\\n  # inside\n\n "
        " && b \\\n  && c\nWORKDIR /app\n"
    )
    assert read(text) == [
        ("ARG", "V=1", 3),
        ("FROM", "ubuntu:$V as base", 4),
        ("RUN", "a   && b   && c", 5),
        ("WORKDIR", "/app", 10),
    ]
    assert [number for number, _ in parse(text, FILE)[2].rows] == [5, 8, 9]


def test_flags_are_taken_off():
    _, copy = parse("FROM a\nCOPY --chmod=755 --link a b\n", FILE)
    assert copy.flags() == ({"chmod": "755", "link": ""}, "a b")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "no FROM"),
        ("RUN x\nFROM a\n", 1, "before FROM"),
        ("FROM a\nRUNX y\n", 2, "unknown instruction 'RUNX'"),
        ("FROM a\n\nRUN\n", 3, "RUN without arguments"),
        ("FROM a\nRUN a\0b\n", 2, "NUL"),
    ],
)
def test_what_is_no_dockerfile(text, line, says):
    with pytest.raises(TaskError, match=says) as caught:
        parse(text, FILE)
    assert caught.value.line == line and not isinstance(caught.value, UnsupportedError)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("FROM a\nRUN cat <<EOF > x\nhello\nEOF\n", 2, "here-document"),
        ("FROM a\nRUN cat <<-'END'\n", 2, "here-document"),
        ('FROM a\nCOPY <<"X" /y\n', 2, "here-document"),
        ("# escape=`\nFROM a\n", 1, "escape"),
    ],
)
def test_what_is_refused_by_name(text, line, says):
    with pytest.raises(UnsupportedError, match=says) as caught:
        parse(text, FILE)
    assert caught.value.line == line


def test_a_shift_and_quoted_marks_are_no_here_documents():
    assert len(read("FROM a\nRUN echo $((1<<2)) '<<EOF' \"<<EOF\" && cat <<<word\n")) == 2


# What `docker build` makes of a word: rules of BuildKit v0.26, checked with the table of its own
# tests (frontend/dockerfile/shell/envVarTest, lex_test.go), of which each rule has a case here.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A/${B}x", "1/two wordsx"),
        ("${A:-d}${C:-d}${EMPTY:-d}${EMPTY-d}", "1dd"),
        ("${A:+y}${C:+y}${EMPTY:+y}${EMPTY+y}", "yy"),
        ("${C:-${D:-${A}}}", "1"),
        ("${C:-a b {A}", "a b {A"),
        ("${A:?}${A?no}", "11"),
        ("\\$A \\${A} \\\\$A", "$A ${A} \\1"),
        ("'$A' \"$A\" '\\$A' \"\\$A\" \"'$A'\"", "$A 1 \\$A $A '1'"),
        ("a\\nb \"a\\nb\" 'a\\nb'", "anb a\\nb a\\nb"),
        ("he'll'o h\\'i", "hello h'i"),
        ("'hello\\'", "hello\\"),
        ("hello\\", "hello"),
        ("$C. $. ${A}}", ". $. 1}"),
        ("$$A $1x $999x $@x ${1:-d}", "A x x x d"),
        ("${PATH1#*/} ${PATH1##*/} ${PATH1%/*} ${PATH1%%/*}", "b/c.txt c.txt a/b a"),
        ("${PATH1/?.txt/x} ${PATH1//\\//-} ${A#} ${STARS%\\**}", "a/b/x a-b-c.txt 1 a"),
    ],
)
def test_words_are_what_docker_build_makes_of_them(text, value):
    variables = {"A": "1", "B": "two words", "EMPTY": "", "PATH1": "a/b/c.txt", "STARS": "a*b"}
    assert expand(text, variables) == value


@pytest.mark.parametrize(
    "text",
    ["he'llo", '"hello', "${}", "${.}", "${A", "${A:=1}", "${C?}", "${C:?no}", "${A:#x}", "${A/x}"],
)
def test_words_that_docker_build_refuses(text):
    with pytest.raises(SubstitutionError):
        expand(text, {"A": "1"})


# The examples of https://docs.docker.com/reference/dockerfile/, "ENV" and "Environment
# replacement", and cases of BuildKit's parser.
@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            'MY_NAME="John Doe" MY_DOG=Rex\\ The\\ Dog MY_CAT=fluffy',
            {"MY_NAME": "John Doe", "MY_DOG": "Rex The Dog", "MY_CAT": "fluffy"},
        ),
        ("ONE TWO= THREE=world", {"ONE": "TWO= THREE=world"}),
        ("abc=bye def=$abc", {"abc": "bye", "def": "hello"}),
        ("A='$abc' B=\"$abc\" C=\\$abc", {"A": "$abc", "B": "hello", "C": "$abc"}),
        ("A 'some  text' $abc", {"A": "some  text hello"}),
        ("A=", {"A": ""}),
        ("A='x y'z", {"A": "x yz"}),
        ("$abc=1", {"hello": "1"}),
    ],
)
def test_env_in_both_forms(text, found):
    instruction = parse(f"FROM a\nENV {text}\n", FILE)[1]
    assert assignments(instruction, FILE, {"abc": "hello"}) == found


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ubuntu", ("ubuntu", "", "")),
        ("python:3.12-slim", ("python", "3.12-slim", "")),
        ("python:3.12-slim@sha256:ab", ("python", "3.12-slim", "sha256:ab")),
        ("python@sha256:ab", ("python", "", "sha256:ab")),
        ("localhost:5000/org/tool", ("localhost:5000/org/tool", "", "")),
        ("localhost:5000/org/tool:1.0@sha256:ab", ("localhost:5000/org/tool", "1.0", "sha256:ab")),
    ],
)
def test_the_parts_of_an_images_name(name, parts):
    assert parse_image_name(name) == parts
    # The engine's own client agrees where it can tell a tag from a digest.
    client = pytest.importorskip("docker.utils")
    if not (parts[1] and parts[2]):
        repository, tag_or_digest = client.parse_repository_tag(name)
        assert (repository, tag_or_digest or "") == (parts[0], parts[1] or parts[2])


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ("python:3.12-slim@sha256:ab", "python"),
        ("docker.io/library/python:3", "python"),
        ("index.docker.io/library/python", "python"),
        ("ghcr.io/org/tool:1@sha256:ab", "ghcr.io/org/tool:1"),
        ("ghcr.io/org/tool:2@sha256:ab", None),
        ("localhost:5000/python", None),
        ("registry:5000/x@sha256:cd", "registry:5000/x@sha256:cd"),
        ("pythonic", None),
    ],
)
def test_an_image_is_known_by_its_name_or_by_all_that_is_given(image, found):
    assert find_image(image, ["python", "ghcr.io/org/tool:1", "registry:5000/x@sha256:cd"]) == found


IGNORED = """\
# comment
*/temp*
*/*/temp*
temp?
**/__pycache__
/root.txt
 docs/ 
*.md
!README*.md
build/**
!build/keep/**
a[b-c].[^x]
"""


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("somedir/temporary.txt", True),
        ("somedir/subdir/temporary.txt", True),
        ("a/b/c/temporary.txt", False),
        ("tempa", True),
        ("temp", False),
        ("__pycache__/x.pyc", True),
        ("a/b/__pycache__/x/y", True),
        ("a/__pycache__x", False),
        ("root.txt", True),
        ("sub/root.txt", False),
        ("docs/a/b.txt", True),
        ("notes.md", True),
        ("sub/notes.md", False),
        ("README-secret.md", False),
        ("build/x/y", True),
        ("build/keep/y", False),
        ("ab.y", True),
        ("ab.x", False),
        ("# comment", False),
    ],
)
def test_ignored_files_are_those_that_docker_leaves_out(path, ignored):
    """Rules and examples of https://docs.docker.com/build/concepts/context/#dockerignore-files."""
    assert is_ignored(path, ignore_patterns(IGNORED)) is ignored


@given(
    patterns=st.lists(
        st.lists(st.sampled_from(["a", "b", "*", "**", "?", "a*", "!", "c.txt"]), min_size=1)
        .map("/".join)
        .filter(lambda pattern: not pattern.startswith(("!/", "**/**")) and "/!" not in pattern),
        max_size=4,
    ),
    path=st.lists(st.sampled_from(["a", "b", "ab", "c.txt"]), min_size=1, max_size=4).map("/".join),
)
def test_ignored_files_are_those_of_the_engines_own_client(patterns, path):
    client = pytest.importorskip("docker.utils.build")
    # Docker's client matches a pattern with ** with one folder above a file only; BuildKit with
    # all, which `docker build` does.
    above = [path.rsplit("/", count)[0] for count in range(path.count("/") + 1)]
    expected = False
    for pattern in patterns:
        one = client.Pattern(pattern)
        if one.dirs and any(one.match(place) for place in above):
            expected = not one.exclusion
    assert is_ignored(path, ignore_patterns("\n".join(patterns))) is expected


def test_the_ignore_file_itself_is_part_of_the_context_unless_it_is_named():
    files = {".dockerignore": (b"*.log\n", 0o644), "a.log": (b"", 0o644), "b": (b"", 0o644)}
    assert sorted(without_ignored(files)) == [".dockerignore", "b"]


PIECE = st.sampled_from(
    [
        *sorted(KEYWORDS),
        "FROM a\n",
        "\\\n",
        "\n",
        "#",
        "<<EOF",
        "[",
        '["a"]',
        "--from=x ",
        "$",
        "${",
        "${A:-",
        "}",
        "'",
        '"',
        "=",
        "A=1",
        "\0",
        "\\",
        " ",
        "\r\n",
        "\ufeff",
        "../..",
        "http://x/y",
    ]
)
ANY = st.lists(st.one_of(PIECE, st.text(max_size=4)), max_size=20).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=ANY)
def test_any_text_is_a_dockerfile_or_a_typed_error(text):
    try:
        for instruction in parse(text, FILE):
            assert (
                instruction.keyword in KEYWORDS
                and instruction.line
                <= text.count("\n") + text.count("\r") + len(text.splitlines()) + 1
            )
            with contextlib.suppress(SubstitutionError):
                expand(instruction.arguments, {"A": "1"})
            if instruction.keyword == "ENV":
                assignments(instruction, FILE, {})
    except TaskError as error:
        assert error.file == FILE and error.line >= 1


@pytest.mark.parametrize(
    "text",
    [
        'RUN "' + '\\"' * 30_000,
        "RUN " + "curl " * 13_000,
        "RUN " + "$" * 60_000,
        "RUN " + "mkdir -p " * 7_000,
        "ENV A " + "a=" * 30_000,
        "RUN [" + "[" * 60_000,
    ],
)
def test_no_text_takes_long(text):
    began = time.process_time()
    _, instruction = parse(f"FROM a\n{text}\n", FILE)
    with contextlib.suppress(SubstitutionError):
        expand(instruction.arguments, {})
    split_words(instruction.arguments)
    needs_of(instruction.arguments)
    assert time.process_time() - began < 5  # the square of the length would be minutes


# -- paths
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        (
            "cat /app/x > '/logs/verifier/reward.txt'",
            "cat /workspace/app/x > '/workspace/logs/verifier/reward.txt'",
        ),
        ("PATH=/app/bin:/usr/bin:/app", "PATH=/workspace/app/bin:/usr/bin:/workspace/app"),
        ("cd /app&& ls /app.", "cd /workspace/app&& ls /workspace/app."),
        (
            (
                "src/app $HOME/app ~/app ./app ../app */tests/* http://h/app ${X}/app $(pwd)/app"
                " s/app/x/"
            ),
            None,
        ),
        ("/application /app-x /app.txt /etc/passwd /tmp/app /usr/app", None),
        ('Path("/data") / "x"', 'Path("/workspace/data") / "x"'),
    ],
)
def test_absolute_paths_of_the_task_and_no_others_go_into_the_workspace(text, inner):
    paths = PathMap("/workspace", ["data"])
    assert paths.inward(text) == (inner or text)
    assert paths.outward(paths.inward(text)) == text


@given(
    text=st.lists(
        st.sampled_from(
            ["/app", "/tests", "/workspace", "/x", " ", "a", "/", "'", "/app/b", ".", "-"]
        ),
        max_size=12,
    ).map("".join),
    root=st.sampled_from(["workspace", "data", "tmp", "usr"]),
)
def test_what_goes_in_comes_out_as_it_was(text, root):
    paths = PathMap("/tmp/rock/s 1/workspace", [root])
    assert paths.outward(paths.inward(text)) == text


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/app/x", "/workspace/app/x"),
        ("/tmp/x", "/tmp/x"),
        ("/", "/workspace"),
        ("/app/../../new/x", "/workspace/new/x"),
        ("/new/./y/", "/workspace/new/y"),
        ("//app", "/workspace/app"),
    ],
)
def test_where_a_path_lies(path, place):
    assert PathMap("/workspace").place(path) == place


@pytest.mark.parametrize("path", ["/usr/bin", "/app/../etc/x", "/proc"])
def test_a_read_only_place_is_refused(path):
    with pytest.raises(ValueError, match="read-only"):
        PathMap("/workspace").place(path)
