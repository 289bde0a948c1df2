"""The embedded backend refuses what it cannot do before anyone plays, with file and line."""

import asyncio
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.tasks.harbor import (
    BuildError,
    TaskError,
    UnsupportedError,
)
from envs.tasks.harbor.dockerfile import KEYWORDS
from envs.tasks.harbor.task import Environment, HarborTask, Step
from tests.envs.tasks.harbor.playing import observe, play


@pytest.mark.parametrize(
    ("files", "line", "says"),
    [
        ({"environment/Dockerfile": "FROM nvidia/cuda:12\n"}, 1, "the image 'nvidia/cuda:12'"),
        ({"environment/Dockerfile": "FROM ubuntu AS a\nFROM a\n"}, 2, "in stages"),
        (
            {
                "environment/Dockerfile": (
                    "FROM ubuntu\nRUN true && \\\n  apt-get install -y libfoo-dev\n"
                )
            },
            3,
            "this machine lacks libfoo-dev",
        ),
        (
            {
                "environment/Dockerfile": (
                    "FROM ubuntu\nRUN apt-get update && apt-get install -y \\\n  git \\\n "
                    " no-such-program\n"
                )
            },
            4,
            "lacks no-such-program",
        ),
        (
            {"environment/Dockerfile": "FROM python:3.12\nRUN pip install numpy\n"},
            2,
            "python3 of this machine lacks numpy",
        ),
        ({"environment/Dockerfile": "FROM ubuntu\nRUN useradd me\n"}, 2, "one unprivileged user"),
        (
            {"environment/Dockerfile": "FROM ubuntu\nADD https://a.b/c /app/\n"},
            2,
            "needs the network",
        ),
        ({"environment/Dockerfile": "FROM ubuntu\nCOPY --from=x a b\n"}, 2, "COPY --from"),
        (
            {"environment/Dockerfile": "FROM ubuntu\nCOPY Dockerfile /usr/local/bin/x\n"},
            2,
            "read-only",
        ),
        ({"environment/Dockerfile": "FROM ubuntu\nWORKDIR /etc/x\n"}, 2, "read-only"),
        (
            {"environment/Dockerfile": "FROM ubuntu\nRUN --mount=type=secret,id=x true\n"},
            2,
            "RUN --mount",
        ),
        (
            {"environment/docker-compose.yaml": "services: {main: {}, db: {}}\n"},
            1,
            "several containers",
        ),
        ({"task.toml": "[environment]\ngpus = 1\n"}, 2, "no GPU"),
        ({"task.toml": '[[environment.mcp_servers]]\nname = "x"\n'}, 1, "mcp_servers"),
        (
            {
                "task.toml": (
                    '[environment]\nnetwork_mode = "no-network"\n[agent]\nnetwork_mode = "public"\n'
                )
            },
            4,
            "one network policy",
        ),
        (
            {
                "task.toml": '[environment]\ndocker_image = "org/private"\n',
                "environment/Dockerfile": None,
            },
            1,
            "the image 'org/private'",
        ),
        (
            {
                "tests/test.sh": (
                    "#!/bin/bash\n\ncurl -LsSf https://example.org/tool.sh | sh\nuvx pytest\n"
                )
            },
            3,
            "needs the network",
        ),
    ],
)
def test_what_the_embedded_backend_cannot_do_is_said_by_name_with_file_and_line(
    harbor, files, line, says
):
    folder = harbor(files)
    with pytest.raises(UnsupportedError, match=says) as caught:
        observe(folder)
    assert caught.value.line == line and str(caught.value).startswith(str(folder)), caught.value


@pytest.mark.parametrize(
    ("dockerfile", "kind", "line", "says"),
    [
        ("FROM ubuntu\nRUN true\nRUN echo bad >&2; exit 3\n", BuildError, 3, "exit 3: bad"),
        ("FROM ubuntu\nRUN cat /app/none\n", BuildError, 2, "/app/none"),
        ("FROM ubuntu\nRUN touch /opt2/x\n", BuildError, 2, "RUN ended with exit"),
        ("FROM ubuntu\nCOPY ../x y\n", TaskError, 2, "no such file"),
        ("FROM ubuntu\nCOPY a b c\n", TaskError, 2, "a target that ends with /"),
        ("FROM ubuntu\nCOPY nothing y\n", TaskError, 2, "no such file"),
        ("FROM ubuntu\nCOPY one\n", TaskError, 2, "a source and a target"),
        ("FROM ubuntu\nENV 1=2 x\n", TaskError, 2, "not NAME=value"),
        ("FROM ubuntu\nENV A='x\n", TaskError, 2, "quote is not closed"),
        ("FROM a b c d\n", TaskError, 1, "not `FROM image"),
        ("FROM ubuntu\nSHELL bash\n", TaskError, 2, "JSON"),
    ],
)
def test_a_build_that_fails_names_its_line(harbor, dockerfile, kind, line, says):
    with pytest.raises(kind, match=says) as caught:
        observe(harbor({"environment/Dockerfile": dockerfile}))
    assert caught.value.line == line


def test_an_image_can_be_given_an_alias_and_its_programs_are_checked(harbor, run):
    folder = harbor({"environment/Dockerfile": "FROM ghcr.io/org/tool:1@sha256:ab\n"})
    assert (
        run(
            play(
                folder,
                "echo x > /app/out.txt",
                images={"ghcr.io/org/tool:1": ("bash",), "ghcr.io/org/tool": ("bash",)},
            )
        )[0]
        == 1.0
    )
    with pytest.raises(UnsupportedError, match="lacks no-such-program"):
        run(
            play(
                folder,
                images={
                    "ghcr.io/org/tool:1": ("no-such-program",),
                    "ghcr.io/org/tool": ("no-such-program",),
                },
            )
        )


def test_a_build_has_its_time_limit(harbor):
    with pytest.raises(BuildError, match="build_timeout_sec"):
        observe(
            harbor(
                {
                    "task.toml": "[environment]\nbuild_timeout_sec = 0.5\n",
                    "environment/Dockerfile": "FROM ubuntu\nRUN sleep 60\n",
                }
            )
        )


ARGUMENT = st.one_of(
    st.sampled_from(
        [
            "ubuntu",
            "/app",
            "a.txt",
            "sub",
            ".",
            "..",
            "/",
            "x" * 300,
            "A=1",
            "$A",
            "${A:-/usr}",
            "'",
            '["sh", "-c", "true"]',
            "[",
            "true",
            "exit 1",
            "/tmp/x",
            "*",
            "a.txt b/ c/",
            "root",
            "kill -9 -1",
            "rm -rf /app /logs",
            "PATH=",
            "A='\n",
            "http://a/b x",
            "--chmod=9 a b",
            "--x=1 a",
            "\\",
            "mkdir /app/x",
            "LD_PRELOAD=/app/x",
        ]
    ),
    st.text(max_size=6),
)
DOCKERFILES = st.lists(
    st.tuples(
        st.sampled_from(sorted(KEYWORDS)), st.lists(ARGUMENT, min_size=1, max_size=3).map(" ".join)
    ).map(" ".join),
    max_size=6,
).map(lambda rows: "\n".join(["FROM ubuntu", *rows]))


@settings(max_examples=20, deadline=None)
@given(text=DOCKERFILES)
def test_any_dockerfile_is_built_or_refused_by_a_typed_error_with_its_line(text):
    context = {"Dockerfile": (b"", 0o644), "a.txt": (b"a", 0o644), "sub/b.txt": (b"b", 0o644)}
    step = Step("task", "Do.", {"test.sh": (b"true", 0o755)})
    task = HarborTask(
        "fuzz",
        pathlib.Path("fuzz"),
        "harbor",
        "1.0",
        Environment(
            context=context,
            dockerfile=text,
            dockerfile_path=pathlib.Path("fuzz/Dockerfile"),
            build_timeout=5.0,
        ),
        (step,),
    )
    try:
        asyncio.run(play(task, "true"))
    except TaskError as error:
        assert str(error).startswith("fuzz/") and error.line <= len(text.splitlines()) + text.count(
            "\r"
        )
