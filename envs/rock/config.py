"""What a sandbox is asked to be, and the results that it returns."""

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from envs.rock.doors import Door

BACKENDS = ("embedded", "docker", "remote")
ISOLATIONS = ("required", "best_available")
TIERS = ("namespaces", "landlock")

MAX_SECONDS = 7 * 24 * 3600.0  # of any time limit
MAX_ENVIRONMENT_BYTES = 100_000  # as JSON, the form in which variables travel
MAX_PORTS = 16  # different ones in `egress` and `doors`
MIN_OPEN_FILES = 96  # for a sandbox's own process
# Grants for `egress` that let the usual package managers work.
PACKAGE_MIRRORS = (
    "pypi.org:443",
    "files.pythonhosted.org:443",
    "registry.npmjs.org:443",
    "deb.debian.org:80",
    "security.debian.org:80",
    "archive.ubuntu.com:80",
    "security.ubuntu.com:80",
)
_HOST_NAME = re.compile(
    r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?)*"
)
_POSITIVE = (
    "memory_mb",
    "pids",
    "cpus",
    "disk_mb",
    "inodes",
    "open_files",
    "timeout",
    "start_timeout",
    "max_output_bytes",
)
# Fields that only some backends have, and these backends.
_FIELDS_OF_BACKENDS = (
    ("tier", ("embedded", "remote")),
    ("runtime", ("docker", "remote")),
    ("verifier_tools", ("embedded", "docker")),
    ("url", ("remote",)),
    ("token", ("remote",)),
)

GrantFields = tuple[str | None, str | None, int]  # name, address, port


@dataclass(frozen=True)
class SandboxConfig:
    """The limits, the isolation and the backend of one sandbox.

    `probe` and `Sandbox.guarantees` say which limits are enforced on this machine.

    Attributes:
      backend: "embedded": made by this machine's kernel; "docker": a container of the engine on
        this machine; "remote": a sandbox of the ROCK admin at `url`.
      isolation: "required" raises IsolationError where a guarantee is missing; "best_available"
        accepts weaker tiers, which `Sandbox.guarantees` shows.
      tier: of the embedded backend: "namespaces", "landlock", or None for the best that works.
      image: docker: the image's name. embedded: the name that a sandbox was committed to, whose
        files the workspace starts with; programs are always this machine's own.
      runtime: docker: "runsc" (gVisor), "kata-runtime", ...; None for the engine's default.
      url: remote: address of the admin, http://host:port.
      token: remote: identifies the user to the admin.
      label: what the sandbox is for, for example an episode's name; stands in each of its denials.
      egress: what may be reached by TCP, see parse_grant; nothing by default.
      doors: names inside that this process answers, "model:80" -> Door (envs.rock.doors). They are
        no part of what makes two configs equal: a build or a snapshot serves any.
      verifier_tools: a directory of this machine that verifiers see read-only at $VERIFIER_TOOLS,
        and that the agent's commands never see; "" for none.
      memory_mb: of all processes together, with the files of the workspace.
      pids: processes and threads together.
      cpus: processors' time a second.
      disk_mb: of the workspace and /tmp together, and of the largest file. With docker a quarter of
        it is /tmp's.
      inodes: files and directories of the workspace and /tmp; with docker a quarter is /tmp's.
      open_files: of one process.
      timeout: seconds for a command that does not name its own.
      start_timeout: seconds.
      max_output_bytes: kept of a command's stdout, and of its stderr.
      env: variables in addition to PATH, HOME and LANG. The host's environment is never passed on.
    """

    backend: str = "embedded"
    isolation: str = "required"
    tier: str | None = None
    image: str | None = None
    runtime: str | None = None
    url: str = ""
    token: str = field(default="", repr=False)
    label: str = ""
    egress: tuple[str, ...] = ()
    doors: Mapping[str, Door] = field(default_factory=dict, repr=False, compare=False)
    verifier_tools: str = ""
    memory_mb: int = 256
    pids: int = 64
    cpus: float = 1.0
    disk_mb: int = 16
    inodes: int = 4096
    open_files: int = 256
    timeout: float = 30.0
    start_timeout: float = 30.0
    max_output_bytes: int = 64 * 1024
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; it is one of {', '.join(BACKENDS)}")
        self._check_backend()
        self._check_isolation()
        self._check_limits()
        check_environment(self.env)
        if self.disk_mb >= self.memory_mb:
            raise ValueError(
                f"disk_mb={self.disk_mb} leaves no memory for programs in"
                f" memory_mb={self.memory_mb}: files are kept in memory"
            )

    def grants(self) -> list[GrantFields]:
        """Return what the sandbox may connect to, as (name, address, port), doors included."""
        doors = [(name, None, port) for name, port in self.opened_doors()]
        return [*(parse_grant(text) for text in self.egress), *doors]

    def opened_doors(self) -> dict[tuple[str, int], Door]:
        """Return `doors` by name and port."""
        return {parse_door(text): door for text, door in self.doors.items()}

    def _check_backend(self) -> None:
        for name, backends in _FIELDS_OF_BACKENDS:
            if getattr(self, name) and self.backend not in backends:
                raise ValueError(
                    f"{name} means nothing to backend={self.backend!r}, only to"
                    f" {' and '.join(backends)}; leave it unset"
                )
        if self.backend == "remote" and not self.url:
            raise ValueError("backend='remote' needs url, the address of a ROCK admin")
        if self.backend == "docker" and not self.image:
            raise ValueError("backend='docker' needs image, the name of a Docker image")

    def _check_isolation(self) -> None:
        if self.isolation not in ISOLATIONS:
            raise ValueError(
                f"isolation is {self.isolation!r}; it is one of {', '.join(ISOLATIONS)}"
            )
        if self.tier is not None and self.tier not in TIERS:
            raise ValueError(f"tier is {self.tier!r}; it is one of {', '.join(TIERS)} or None")
        if self.isolation == "required" and self.tier == "landlock":
            raise ValueError(
                "tier='landlock' does not give the guarantees of isolation='required'; use"
                " isolation='best_available'"
            )

    def _check_limits(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        check_seconds("timeout", self.timeout)
        check_seconds("start_timeout", self.start_timeout)
        if self.open_files < MIN_OPEN_FILES:
            raise ValueError(
                f"open_files is {self.open_files}; a sandbox's own process needs {MIN_OPEN_FILES}"
            )
        if len({port for _, _, port in self.grants()}) > MAX_PORTS:
            raise ValueError(f"egress and doors have more than {MAX_PORTS} different ports")
        self._check_doors()

    def _check_doors(self) -> None:
        granted = {(name, port) for name, _, port in map(parse_grant, self.egress)}
        for text in self.doors:
            name, port = parse_door(text)
            if (name, port) in granted:
                raise ValueError(
                    f"{text} is a door and granted by egress too; leave out one of them"
                )


def parse_grant(text: str) -> GrantFields:
    """Parse one entry of `SandboxConfig.egress`.

        pypi.org:443            that name, wherever a resolver outside says it is; a private address
                                is refused
        *.example.org:443       every name below it
        10.1.2.3:8080           that IPv4 address
        model@127.0.0.1:30000   the name `model`, which leads to that address as seen from outside,
                                for example the host itself

    Returns:
      (name, address, port). The name or the address is None where the entry has none.

    Raises:
      ValueError: the entry has none of these forms.
    """
    host, _, port = text.rpartition(":")
    name = ""
    address = ""
    if "@" in host:
        name, _, address = host.partition("@")
        valid = bool(_HOST_NAME.fullmatch(name)) and _is_ipv4(address)
    elif re.fullmatch(r"[0-9.]+", host):
        address = host
        valid = _is_ipv4(address)
    else:
        name = host
        valid = bool(_HOST_NAME.fullmatch(name))
    if not valid or not _is_port(port):
        raise ValueError(
            f"egress grant {text!r} is none of NAME:PORT, *.NAME:PORT, IPV4:PORT, NAME@IPV4:PORT"
        )
    if not name and ipaddress.IPv4Address(address).is_loopback:
        raise ValueError(
            f"egress grant {text!r}: {address} is the sandbox's own loopback; write"
            f" NAME@{address}:{port} for the host's"
        )
    return name.lower() or None, address or None, int(port)


def parse_door(text: str) -> tuple[str, int]:
    """Parse a key of `SandboxConfig.doors`, NAME:PORT.

    Returns:
      (name in lower case, port).

    Raises:
      ValueError: it is not a host name and a port; localhost and addresses are the sandbox's own.
    """
    name, _, port = text.rpartition(":")
    is_name = bool(_HOST_NAME.fullmatch(name)) and not name.startswith("*")
    is_own = name.lower() == "localhost" or name.replace(".", "").isdecimal()
    if not is_name or is_own or not _is_port(port):
        raise ValueError(f"door {text!r} is not NAME:PORT, for example model:80")
    return name.lower(), int(port)


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 1 << 16


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def check_seconds(name: str, value: float) -> None:
    """Raise ValueError for a time limit that is not above 0 and at most MAX_SECONDS."""
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(
            f"{name} is {value}; give seconds above 0 and at most {MAX_SECONDS:.0f} (7 days)"
        )


def check_environment(env: Mapping[str, str]) -> None:
    """Raise ValueError for variables that cannot be passed to a program."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value or not is_encodable(name + value):
            raise ValueError(
                f"environment variable {name!r}={value[:200]!r} cannot be passed to a program"
            )
    size = len(json.dumps(dict(env)))
    if size > MAX_ENVIRONMENT_BYTES:
        raise ValueError(
            f"the environment has {size} bytes as JSON, the limit is {MAX_ENVIRONMENT_BYTES}; put"
            " large values into a file"
        )


def is_encodable(text: str) -> bool:
    """Return whether a text can be an argument, a variable or a path: it has no lone surrogate.

    Those that stand for undecodable bytes are allowed, see PEP 383.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class CommandResult:
    """How a command ended and what it wrote.

    Attributes:
      stdout: the first `max_output_bytes`, decoded as UTF-8; invalid bytes are replaced.
      stderr: the same of standard error.
      exit_code: the command's; 137 (128 + SIGKILL) if it was killed.
      timed_out: whether it was killed at its time limit.
      truncated: whether more was written than was kept.
      seconds: how long it ran.
      limits_hit: the limits that struck: of "timeout", "memory", "pids", "disk", "output" (it wrote
        far more than is kept) and "killed" (by a call).
      network_denials: refused connections since the command before; `Sandbox.denials` lists them.
      cut: bytes of stdout and of stderr that were written but not kept.
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    truncated: bool
    seconds: float
    limits_hit: tuple[str, ...] = ()
    network_denials: int = 0
    cut: tuple[int, int] = (0, 0)


FILE_KINDS = ("file", "directory", "link", "special")


class FileEntry(NamedTuple):
    """One file in a listing.

    Attributes:
      path: relative to the listed directory.
      kind: one of FILE_KINDS.
      size: in bytes.
      mode: permission bits.
    """

    path: str
    kind: str
    size: int
    mode: int


class Address(NamedTuple):
    """A TCP address on this host."""

    host: str
    port: int


class Denial(NamedTuple):
    """One attempt to reach what the egress policy does not grant.

    Attributes:
      time: seconds since 1970.
      protocol: "tcp", "udp", "dns" or "icmp".
      destination: an address; for "dns" the name that was asked for.
      port: 0 where there is none.
      label: the sandbox's.
    """

    time: float
    protocol: str
    destination: str
    port: int
    label: str


class SandboxStatus(NamedTuple):
    """What a sandbox uses at one moment; None where this machine does not count it.

    Attributes:
      memory_bytes: with the files of the workspace.
      pids: processes and threads.
      cpu_seconds: of commands that have ended.
      disk_bytes: of the workspace and /tmp.
      inodes: of the workspace and /tmp.
      commands: running now.
      sessions: open now.
      network_denials: since the start.
    """

    memory_bytes: int | None
    pids: int | None
    cpu_seconds: float
    disk_bytes: int
    inodes: int
    commands: int
    sessions: int
    network_denials: int | None
