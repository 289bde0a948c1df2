"""What a sandbox is asked to be, and what a command's end looks like."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

BACKENDS = ("embedded", "docker", "remote")
ISOLATIONS = ("required", "best_available")
TIERS = ("namespaces", "landlock")

MAX_PORTS = 16
PACKAGE_MIRRORS = (
    "pypi.org:443",
    "files.pythonhosted.org:443",
    "registry.npmjs.org:443",
    "deb.debian.org:80",
    "security.debian.org:80",
    "archive.ubuntu.com:80",
    "security.ubuntu.com:80",
)  # for `egress`
_HOST_NAME = re.compile(
    r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*"
)


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of one sandbox.

    Which of them are enforced here, `probe` and `Sandbox.guarantees` say.
    """

    # "docker": a container of the engine on this machine; "remote": a sandbox of the ROCK admin at
    # `url`
    backend: str = "embedded"
    isolation: str = "required"  # "best_available" falls back to weaker tiers and says so
    # of the embedded backend. None: the best one that works here; a name: that one or an error
    tier: str | None = None
    # docker: the image's name; embedded: this machine's own programs, with the files of a sandbox
    # that was committed to that name
    image: str | None = None
    # docker: "runsc" (gVisor), "kata-runtime", ...; None: the engine's default
    runtime: str | None = None
    url: str = ""  # remote: where the admin is, http://host:port
    token: str = field(default="", repr=False)  # remote: what the admin knows us by
    label: str = ""  # what it is for, an episode's name say; it stands beside each of its denials
    egress: tuple[str, ...] = ()  # what may be reached by TCP, see parse_grant; nothing by default
    memory_mb: int = 256  # of all processes together, files in the workspace included
    pids: int = 64  # processes and threads together
    cpus: float = 1.0
    # workspace and /tmp together (docker: a quarter is /tmp's, as of inodes); also the largest file
    disk_mb: int = 16
    inodes: int = 4096
    open_files: int = 256  # of one process
    timeout: float = 30.0  # seconds for a command that names none
    start_timeout: float = 30.0
    max_output_bytes: int = 64 * 1024  # kept of stdout and of stderr, each
    env: Mapping[str, str] = field(
        default_factory=dict
    )  # added to PATH, HOME and LANG; nothing of the host's environment is

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; it is one of {', '.join(BACKENDS)}")
        self._check_backend()
        if self.isolation not in ISOLATIONS:
            raise ValueError(
                f"isolation is {self.isolation!r}; it is one of {', '.join(ISOLATIONS)}"
            )
        if self.tier is not None and self.tier not in TIERS:
            raise ValueError(f"tier is {self.tier!r}; it is one of {', '.join(TIERS)} or None")
        if self.isolation == "required" and self.tier == "landlock":
            raise ValueError(
                "isolation='required' cannot be had from tier='landlock'; use"
                " isolation='best_available'"
            )
        for name in (
            "memory_mb",
            "pids",
            "cpus",
            "disk_mb",
            "inodes",
            "open_files",
            "timeout",
            "start_timeout",
            "max_output_bytes",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.open_files < 96:
            raise ValueError(f"open_files is {self.open_files}; a sandbox's own process needs 96")
        if len({port for *_, port in self.grants()}) > MAX_PORTS:
            raise ValueError(f"egress grants more than {MAX_PORTS} different ports")
        check_environment(self.env)
        if self.disk_mb >= self.memory_mb:
            raise ValueError(
                f"disk_mb={self.disk_mb} leaves no memory for programs in"
                f" memory_mb={self.memory_mb}: files are kept in memory"
            )

    def grants(self) -> list[tuple[str | None, str | None, int]]:
        """`egress`, parsed."""
        return [parse_grant(text) for text in self.egress]

    def _check_backend(self) -> None:
        for name, backends in (
            ("tier", ("embedded", "remote")),
            ("runtime", ("docker", "remote")),
            ("url", ("remote",)),
            ("token", ("remote",)),
        ):
            if getattr(self, name) and self.backend not in backends:
                raise ValueError(
                    f"{name} means nothing to backend={self.backend!r}, only to"
                    f" {' and '.join(backends)}; leave it unset"
                )
        if self.backend == "remote" and not self.url:
            raise ValueError("backend='remote' needs url, the address of a ROCK admin")
        if self.backend == "docker" and not self.image:
            raise ValueError("backend='docker' needs image, the name of a Docker image")


def parse_grant(text: str) -> tuple[str | None, str | None, int]:
    """(name, address, port) of one entry of `egress`.

        pypi.org:443              that name, wherever a resolver outside says it is; a private address is refused
        *.example.org:443         every name below it
        10.1.2.3:8080             that IPv4 address
        model@127.0.0.1:30000     the name `model`, which leads to that address as seen from outside, the host itself for example

    Raises: ValueError for anything else, naming it.
    """
    host, _, port = text.rpartition(":")
    both = "@" in host
    name, _, address = (
        host.partition("@")
        if both
        else ("", "", host)
        if re.fullmatch(r"[0-9.]+", host)
        else (host, "", "")
    )
    valid = (
        port.isdecimal()
        and 0 < int(port) < 1 << 16
        and (_HOST_NAME.fullmatch(name) if both or not address else True)
    )
    if not valid or ((both or not name) and not _is_ipv4(address)):
        raise ValueError(
            f"egress grant {text!r} is none of NAME:PORT, *.NAME:PORT, IPV4:PORT, NAME@IPV4:PORT"
        )
    if not name and ipaddress.IPv4Address(address).is_loopback:
        raise ValueError(
            f"egress grant {text!r}: {address} is the sandbox's own loopback; write"
            f" NAME@{address}:{port} for the host's"
        )
    return name.lower() or None, address or None, int(port)


def _is_ipv4(text: str) -> bool:
    try:
        return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def check_environment(env: Mapping[str, str]) -> None:
    """ValueError for a variable that cannot be passed to a program."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(
                f"environment variable {name!r}={value!r} cannot be passed to a program"
            )


@dataclass(frozen=True)
class CommandResult:
    """How a command ended.

    A killed one has exit code 137 (128 + SIGKILL), and `limits_hit` says by what.
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    truncated: bool  # more was written than max_output_bytes
    seconds: float
    limits_hit: tuple[str, ...] = ()  # of "timeout", "memory", "pids", "disk", "output", "killed"
    network_denials: int = 0  # seen since the command before; `Sandbox.denials` has more of each
    cut: tuple[int, int] = (
        0,
        0,
    )  # bytes of stdout and of stderr that were written and not kept; of a flood those until its end


class FileEntry(NamedTuple):
    path: str  # relative to the directory that was listed
    kind: str  # "file", "directory", "link" or "special"
    size: int
    mode: int  # permission bits


class Address(NamedTuple):
    host: str
    port: int


class Denial(NamedTuple):
    """One attempt to reach what the egress policy does not grant."""

    time: float  # seconds since 1970
    protocol: str  # "tcp", "udp", "dns" or "icmp"
    destination: str  # an address, or for "dns" the name that was asked for
    port: int  # 0 where there is none
    label: str  # of the sandbox


class SandboxStatus(NamedTuple):
    """What a sandbox uses at one moment. None: not counted on this machine."""

    memory_bytes: int | None  # files of the workspace included
    pids: int | None
    cpu_seconds: float  # of commands that have ended
    disk_bytes: int
    inodes: int
    commands: int  # that run now
    sessions: int
    network_denials: int | None  # attempts to reach what is not granted, since the start
