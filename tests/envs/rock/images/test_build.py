"""Images from Dockerfiles: built once for each content, without a network, in bounded time, with
the log where it fails.
"""

import asyncio
import pathlib
import time

import pytest

from envs.rock import Sandbox, SandboxConfig
from envs.rock.errors import ImageError
from tests.envs.rock.engine import Engine

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


def context(
    path: pathlib.Path, dockerfile: str, files: dict[str, str] | None = None
) -> pathlib.Path:
    path.mkdir(exist_ok=True)
    (path / "Dockerfile").write_text(dockerfile)
    for name, content in (files or {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


def build(path: pathlib.Path, **options) -> str:
    from envs.rock.images import build as images

    return asyncio.run(images.build(path, **{"timeout": 60, **options}))


def test_an_image_is_built_once_and_a_sandbox_runs_in_it(engine: Engine, tmp_path):
    from envs.rock.images import build as images

    dockerfile = (
        f"FROM {engine.image}\nARG WORD=none\nENV KIND=built PATH=/opt:/usr/bin\nCOPY dir"
        " /srv/dir\nRUN echo $WORD > /word; cat /proc/net/dev | wc -l > /interfaces\nUSER 1234\n"
    )
    place = context(
        tmp_path / "c",
        dockerfile,
        {"dir/f": "copied", "dir/secret": "s", ".dockerignore": "# none of these\ndir/secret\n"},
    )
    (place / "dir/link").symlink_to("/etc/passwd")

    async def twice_at_once():
        return await asyncio.gather(
            *(images.build(place, args={"WORD": "x"}, timeout=60) for _ in range(2))
        )

    first, second = asyncio.run(twice_at_once())
    began = time.perf_counter()
    third = build(place, args={"WORD": "x"})
    assert (
        first == second == third
        and first.startswith("rock/env:")
        and time.perf_counter() - began < 30
    )

    async def look():
        async with Sandbox(SandboxConfig(backend="docker", image=first)) as sandbox:
            return await sandbox.execute(
                "cat /word /interfaces /srv/dir/f; echo; echo $KIND $PATH; ls -A /srv/dir; readlink"
                " /srv/dir/link; [ $(id -u) != 1234 ] && echo other"
            )

    assert (
        asyncio.run(look()).stdout
        == "x\n3\ncopied\nbuilt /opt:/usr/bin\nf\nlink\n/etc/passwd\nother\n"
    )  # three lines: a head of two, and lo


def test_the_name_changes_with_the_content_and_with_nothing_else(tmp_path):
    from envs.rock.images import build as images

    def digest(place: pathlib.Path, dockerfile: str = "Dockerfile") -> str:
        with open(tmp_path / "tar", "w+b") as file:
            return images._pack(place, dockerfile, file)

    one, two = (
        context(tmp_path / name, "FROM x\n", {"a": "1", "d/b": "2"}) for name in ("one", "two")
    )
    (two / "a").touch()
    (two / "d").chmod(0o700)
    assert digest(one) == digest(two)
    seen = {digest(one)}
    for change in (
        lambda: (one / "a").write_text("3"),
        lambda: (one / "a").chmod(0o755),
        lambda: (one / "d/b").rename(one / "d/c"),
        lambda: (one / "Dockerfile").write_text("FROM y\n"),
        lambda: (one / "l").symlink_to("a"),
        lambda: (one / "empty").mkdir(),
    ):
        change()
        seen.add(digest(one))
    assert len(seen) == 7
    assert (
        len(
            {images._tag("d", "Dockerfile", args) for args in ({}, {"A": "b"}, {"A": "c"})}
            | {images._tag("d", "other", {})}
        )
        == 4
    )


def test_a_failed_build_says_why_with_the_end_of_its_log(engine: Engine, tmp_path):
    place = context(
        tmp_path / "c", f"FROM {engine.image}\nRUN seq 100000; echo the last word; exit 3\n"
    )
    with pytest.raises(ImageError, match="returned a non-zero code: 3") as caught:
        build(place)
    assert "the last word" in caught.value.log and len(caught.value.log) <= 32 << 10
    with pytest.raises(ImageError, match=r"there is no Dockerfile\.test in"):
        build(place, dockerfile="Dockerfile.test")
    with pytest.raises(ImageError, match=r"(?i)unknown instruction"):
        build(context(tmp_path / "d", f"FROM {engine.image}\nNONSENSE\n"))


def test_a_build_has_no_network_and_ends_at_its_time_limit(engine: Engine, tmp_path):
    from envs.rock.docker.engine import engine as docker_engine

    silent = context(
        tmp_path / "c",
        f"FROM {engine.image}\nRUN bash -c '! echo > /dev/tcp/1.1.1.1/80' && sleep 615\n",
    )
    with pytest.raises(ImageError, match=r"was not built .* within 2 s"):
        build(silent, timeout=2)
    deadline = time.monotonic() + 60
    while (left := docker_engine().client.containers(all=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
