"""Dockerfiles: what is read, what is refused by name and line, and any text at all; and what paths
become.
"""

import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks.harbor import TaskError, UnsupportedError
from envs.tasks.harbor.dockerfile import KEYWORDS, assignments, parse, substitute
from envs.tasks.harbor.offline import network_need, packages
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A/${B}x", "1/2x"),
        ("${A:-d}${C:-d}", "1d"),
        ("${A:+y}${C:+y}", "y"),
        ("\\$A", "$A"),
        ("$C.", "."),
        ("$$A", "$1"),
        ("a\\nb", "a\\nb"),
    ],
)
def test_variables_as_docker_fills_them_in(text, value):
    assert substitute(text, {"A": "1", "B": "2"}) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=1 B='x y' C=\"p q\"", {"A": "1", "B": "x y", "C": "p q"}),
        ("A some text", {"A": "some text"}),
        ("A=a\\ b", {"A": "a b"}),
        ("A=", {"A": ""}),
        ("A x=y", {"A": "x=y"}),
    ],
)
def test_env_in_both_forms(text, found):
    assert assignments(parse(f"FROM a\nENV {text}\n", FILE)[1], FILE) == found


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
            substitute(instruction.arguments, {"A": "1"})
            if instruction.keyword == "ENV":
                assignments(instruction, FILE)
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
    substitute(instruction.arguments, {})
    network_need(instruction.arguments)
    packages(instruction.arguments)
    assert time.process_time() - began < 5  # the square of the length would be minutes


# -- the network
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "apt-get update",
        "apt-get -y -q install git",
        "pip install x",
        "python3 -m pip install x",
        "uvx pytest",
        "curl -LsSf https://astral.sh/x | sh",
        "wget http://a.b/c",
        "git clone https://a/b",
        "npm ci",
    ],
)
def test_commands_that_need_the_network(command):
    assert network_need(f"true\n# {command}\n{command}\n")[0] == 3


@pytest.mark.parametrize(
    "command",
    [
        "curl http://localhost:80/",
        "wget -q http://127.0.0.1/x",
        "curl $URL",
        "git clone /app/a b",
        "pip install --no-index x",
        "echo apt",
        "aptitude",
        "grep install x",
        "uv --version",
    ],
)
def test_commands_that_do_not(command):
    assert network_need(command) is None


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (
            (
                "apt-get update && apt-get install -y --no-install-recommends git=1 tmux && rm -rf"
                " /var/lib/apt/lists/*"
            ),
            ["git", "tmux"],
        ),
        ("apt-get update", []),
        ("apt-get install -y git && make", None),
        ("make", None),
        ("DEBIAN_FRONTEND=noninteractive apt install -y git; apt-get clean", ["git"]),
    ],
)
def test_commands_that_only_install_packages(command, found):
    assert packages(command) == found


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
