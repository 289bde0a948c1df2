"""A Docker engine of the tests' own: a dockerd with its own socket and state, and a base image made
without a registry.

`engine` is the fixture, of the whole session (conftest.py). Where none can run, its tests are
skipped with the reason; with CI=true and as root the fixture first tries to install Debian's
docker.io.
"""

import collections.abc
import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time

import pytest

START_SECONDS, END_SECONDS, INSTALL_SECONDS = 30.0, 20.0, 180.0
IMAGE = "rock-test/base:1"
PERL = pathlib.Path(
    f"/usr/lib/{os.uname().machine}-linux-gnu/perl-base"
)  # what Debian's own perl needs; it can do any system call
PROGRAMS = (
    "bash",
    "sh",
    "cat",
    "chmod",
    "cp",
    "cut",
    "df",
    "du",
    "env",
    "find",
    "grep",
    "head",
    "id",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mkfifo",
    "mv",
    "nohup",
    "printf",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "setsid",
    "sleep",
    "sort",
    "split",
    "stat",
    "tail",
    "tar",
    "touch",
    "tr",
    "truncate",
    "wc",
    "yes",
    "hostname",
    "unshare",
    "mount",
    "mknod",
    "perl",
)


class Engine:
    """Where it listens (DOCKER_HOST), the image that it has, and its daemon's process."""

    def __init__(self, host: str, image: str, pid: int):
        self.host, self.image, self.pid = host, image, pid


@pytest.fixture(scope="session")
def engine() -> collections.abc.Iterator[Engine]:
    with contextlib.ExitStack() as cleanup:
        yield cleanup.enter_context(running_engine())


@contextlib.contextmanager
def running_engine() -> collections.abc.Iterator[Engine]:
    """pytest.skip where no engine can run. DOCKER_HOST names it as long as it runs."""
    docker = pytest.importorskip("docker", reason="the docker package is not installed")
    obstacle = _obstacle()
    if obstacle:
        pytest.skip(obstacle)
    place = pathlib.Path(tempfile.mkdtemp(prefix="rock-engine-"))
    before = os.environ.get("DOCKER_HOST")
    # Neither a bridge nor firewall rules: sandboxes have no network, and the machine's own are left
    # alone.
    with open(place / "log", "wb") as log:
        daemon = subprocess.Popen(
            [
                "dockerd",
                "--data-root",
                str(place / "root"),
                "--exec-root",
                str(place / "exec"),
                "-p",
                str(place / "pid"),
                "-H",
                f"unix://{place}/docker.sock",
                "--bridge",
                "none",
                "--iptables=false",
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        host = f"unix://{place}/docker.sock"
        client = _wait_until_it_answers(docker, host, daemon, place / "log")
        client.import_image_from_data(
            base_image(), repository=IMAGE.split(":")[0], tag=IMAGE.split(":")[1]
        )
        client.close()
        os.environ["DOCKER_HOST"] = host
        yield Engine(host, IMAGE, daemon.pid)
    finally:
        os.environ.pop("DOCKER_HOST", None)
        if before is not None:
            os.environ["DOCKER_HOST"] = before
        _end(daemon, place)
        _remove(place)


def _obstacle() -> str:
    """Why no engine can run here; "" if nothing is known against it."""
    if os.geteuid() != 0:
        return "no Docker engine: dockerd needs root"
    if not shutil.which("dockerd") and os.environ.get("CI") == "true" and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-q"],
            ["apt-get", "install", "-q", "-y", "--no-install-recommends", "docker.io"],
        ):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=INSTALL_SECONDS / 2,
                )
    return (
        ""
        if shutil.which("dockerd")
        else "no Docker engine: dockerd is not installed (apt-get install docker.io)"
    )


def _wait_until_it_answers(docker, host: str, daemon: subprocess.Popen, log: pathlib.Path):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and daemon.poll() is None:
        with contextlib.suppress(docker.errors.DockerException):
            client = docker.APIClient(host, version="auto", timeout=30)
            client.ping()
            return client
        time.sleep(0.05)
    words = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word of it"]
    pytest.skip(f"no Docker engine: dockerd does not run here: {words[0][-300:]}")


def _end(daemon: subprocess.Popen, place: pathlib.Path) -> None:
    """dockerd ends its containers and its containerd; what is left of them after a while, known by
    the folder in its command line, is killed.
    """
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(place).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


def _remove(place: pathlib.Path) -> None:
    """With what is still mounted below it; more than once, since what was killed a moment ago may
    hold or write a file yet.
    """
    for _ in range(50):
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split()[4] for line in file]
        for mount in sorted(
            (mount for mount in mounts if mount.startswith(f"{place}/")), key=len, reverse=True
        ):
            subprocess.run(["umount", "-l", mount], stderr=subprocess.DEVNULL, timeout=10)
        shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            return
        time.sleep(0.1)


def base_image() -> bytes:
    """A tar of this machine's bash and the usual programs, with the libraries that they need."""
    files = {}
    for name in PROGRAMS:
        path = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
        if path:
            files[f"usr/bin/{name}"] = os.path.realpath(path)
    for library in set(
        re.findall(
            r"(/\S+) \(0x",
            subprocess.run(
                ["ldd", *files.values()], capture_output=True, text=True, timeout=30
            ).stdout,
        )
    ):
        files[_below_usr(library)] = os.path.realpath(library)
    files |= {
        str(path).lstrip("/"): str(path) for path in PERL.rglob("*") if path.is_file()
    } | _python()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("usr", "usr/bin", "etc", "proc", "sys", "dev", "run", "root", "var", "home"):
            _add(tar, name, tarfile.DIRTYPE, 0o755)
        for name in ("tmp", "var/tmp"):
            _add(tar, name, tarfile.DIRTYPE, 0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            _add(tar, name, tarfile.SYMTYPE, link="usr/" + name.replace("sbin", "bin"))
        _add(
            tar,
            "etc/passwd",
            content=b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/nonexistent:/bin/sh\n",
        )
        for name, path in sorted(files.items()):
            _add(tar, name, mode=0o755, content=pathlib.Path(path).read_bytes())
    return buffer.getvalue()


def _python() -> dict[str, str]:
    """The system's Python and the modules that hostile programs use; nothing where it has none."""
    program = pathlib.Path("/usr/bin/python3").resolve()
    library = pathlib.Path(f"/usr/lib/{program.name}")
    if not program.exists() or not library.exists():
        return {}
    left_out = {
        "test",
        "idlelib",
        "tkinter",
        "lib2to3",
        "ensurepip",
        "distutils",
        "pydoc_data",
        "__pycache__",
        "dist-packages",
    }
    modules = [
        path
        for path in library.rglob("*.*")
        if not left_out & set(path.relative_to(library).parts)
        and path.suffix in (".py", ".so")
        and not path.parent.name.startswith("config-")
    ]
    binaries = [str(program), *(str(path) for path in modules if path.suffix == ".so")]
    needed = set(
        re.findall(
            r"(/\S+) \(0x",
            subprocess.run(["ldd", *binaries], capture_output=True, text=True, timeout=30).stdout,
        )
    )
    return (
        {"usr/bin/python3": str(program)}
        | {str(path).lstrip("/"): str(path) for path in modules}
        | {_below_usr(path): os.path.realpath(path) for path in needed}
    )


def _below_usr(path: str) -> str:
    return path.lstrip("/") if path.startswith("/usr/") else f"usr{path}"


def _add(
    tar: tarfile.TarFile,
    name: str,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    link: str = "",
    content: bytes = b"",
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname, member.size = kind, mode, link, len(content)
    tar.addfile(member, io.BytesIO(content))
