"""What this machine can do for training: tries each mechanism, says what it gives, and what to do
for more.

python -m launch.doctor [--quick] [--json FILE]

Ends with one demonstration played in a sandbox from task to verdict. Exit status 1 where that
fails, since then nothing can be trained. `--quick` plays only that and says something only when it
fails: `make train` begins with it.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import importlib.metadata
import json
import pathlib
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from envs.rock import Sandbox, SandboxConfig, SandboxError, probe
from envs.rock.config import TIERS
from envs.rock.docker.probe import probe_docker
from envs.rock.host import cgroups
from envs.tasks.terminal import FAMILIES, train_seed
from envs.tasks.terminal.demonstrator import play_demonstration
from envs.tasks.terminal.env import TerminalEnv

SECONDS = 60.0
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")


class Finding(NamedTuple):
    what: str
    works: bool
    says: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """One after the other, as they are found."""
    for check in (
        _packages,
        _devices,
        _tokenizer,
        *(lambda tier=tier: _tier(tier) for tier in TIERS),
        _choice,
        _cgroups,
        _forks,
        _docker,
        _episode,
    ):
        yield check()


def _packages() -> Finding:
    missing = [name for name in PACKAGES if not _version(name)]
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if name not in missing)
    return Finding(
        "packages",
        not missing,
        f"Python {platform.python_version()}; {versions}",
        f"missing: {', '.join(missing)}; `make environment` installs them" if missing else "",
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> Finding:
    """In a process of its own: a chip that is looked at is held.

    The engine's module is imported there too.
    """
    program = (
        "import jax, rome.serve.server; print(jax.default_backend(), len(jax.devices()),"
        " jax.devices()[0].device_kind)"
    )
    chips = [
        kind
        for kind, pattern in (("GPU", "/dev/nvidia[0-9]*"), ("TPU", "/dev/accel*"))
        if glob.glob(pattern)
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=4 * SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "accelerator, engine",
            False,
            f"JAX found no device within {4 * SECONDS:.0f} s",
            "is another process holding the chip?",
        )
    if done.returncode:
        return Finding(
            "accelerator, engine",
            False,
            (done.stderr.strip().splitlines() or ["it ended without a word"])[-1],
            "the environment is damaged: `make clean environment`",
        )
    backend, count, kind = done.stdout.split(maxsplit=2)
    unused = chips if backend == "cpu" else []
    remedy = (
        f"there is a {unused[0]}, and this JAX has no backend for it: `make clean`, then `make"
        f" environment ACCELERATOR={'cuda' if unused[0] == 'GPU' else 'tpu'}`"
        if unused
        else ""
    )
    return Finding(
        "accelerator, engine",
        not unused,
        f"{count} {backend} device{'s' if count != '1' else ''} ({kind.strip()}); the embedded"
        " engine runs there too",
        remedy,
    )


def _tokenizer() -> Finding:
    from rome.model.tokenizer import TINY, Tokenizer

    tokenizer = Tokenizer.load(TINY)
    text = "ls -la <|im_end|> naïve"
    works = tokenizer.decode(tokenizer.encode(text)) == text
    return Finding(
        "tokenizer",
        works,
        (
            f"{tokenizer.vocab_size} tokens, text comes back as it went in"
            if works
            else "a text does not come back"
        ),
        "" if works else "the package tokenizers is damaged: `make clean environment`",
    )


def _tier(tier: str) -> Finding:
    report = probe(tier=tier)
    if report.tier is None:
        return Finding(
            f"sandbox tier {tier}", False, report.missing[0].reason, report.missing[0].remedy
        )
    lacks = [
        item for item in report.missing if tier != "landlock" or item.guarantee in ("memory", "cpu")
    ]
    says = f"enforces {', '.join(sorted(report.guarantees))}" + (
        f"; not {', '.join(item.guarantee for item in report.missing)}" if report.missing else ""
    )
    return Finding(f"sandbox tier {tier}", True, says, lacks[0].remedy if lacks else "")


def _choice() -> Finding:
    """What a sandbox that asks for nothing special is here."""
    report = probe("best_available")
    if report.tier is None:
        return Finding(
            "sandboxes",
            False,
            "none of the embedded backend; backend='docker' or 'remote' may do",
            report.missing[0].remedy,
        )
    try:
        report.require("required")
    except SandboxError:
        lost = ", ".join(item.guarantee for item in report.missing)
        return Finding(
            "sandboxes",
            True,
            f"the embedded backend's tier {report.tier}, and only under isolation='best_available':"
            f" not enforced are {lost}",
            report.missing[0].remedy,
        )
    return Finding(
        "sandboxes",
        True,
        f"the embedded backend's tier {report.tier}; isolation='required' can be had",
    )


def _cgroups() -> Finding:
    place, reason = cgroups.find()
    if place is None:
        return Finding(
            "cgroups",
            False,
            reason,
            "run as root, or as an ordinary user under `systemd-run --user --scope`",
        )
    return Finding("cgroups", True, f"version {place.version}: {', '.join(sorted(place.parents))}")


def _forks() -> Finding:
    """Whether a sandbox that starts from a snapshot lies over it or copies it."""

    async def fork() -> tuple[str, str]:
        config = SandboxConfig(isolation="best_available")
        async with Sandbox(config) as first:
            await first.execute("echo kept > f")
            snapshot = await first.snapshot()
            async with Sandbox(config, snapshot) as second:
                kept = (await second.execute("cat f")).stdout
                mounts = (await second.execute("cat /proc/self/mountinfo 2>/dev/null")).stdout
            await snapshot.delete()
        return kept, mounts

    try:
        kept, mounts = asyncio.run(asyncio.wait_for(fork(), SECONDS))
    except (TimeoutError, SandboxError) as error:
        return Finding("snapshots", False, str(error) or "no answer", "see the sandbox tiers above")
    over = any(" /workspace " in line and " overlay " in line for line in mounts.splitlines())
    return Finding(
        "snapshots",
        kept == "kept\n",
        "a fork lies over its snapshot, copy-on-write" if over else "a fork copies its snapshot",
        "" if over else "copy-on-write takes the namespaces tier and Linux 6.6",
    )


def _docker() -> Finding:
    report = probe_docker()
    if report.tier is None:
        return Finding(
            "Docker",
            False,
            f"{report.missing[0].reason}; only backend='docker' needs it",
            report.missing[0].remedy,
        )
    says = f"enforces {', '.join(sorted(report.guarantees))}" + (
        f"; not {', '.join(item.guarantee for item in report.missing)}" if report.missing else ""
    )
    return Finding("Docker", True, says, report.missing[0].remedy if report.missing else "")


def _episode() -> Finding:
    """Play the scripted solution of one task: sandbox, commands, verifier."""
    env = TerminalEnv(f"{FAMILIES[0]}/{train_seed(1)}", SandboxConfig(isolation="best_available"))
    try:
        played = asyncio.run(
            asyncio.wait_for(play_demonstration(env, random.Random(0), 0.0), SECONDS)
        )
    except (TimeoutError, SandboxError, OSError) as error:
        return Finding(
            "an episode",
            False,
            str(error) or f"it did not end within {SECONDS:.0f} s",
            "`python -m launch.doctor` says what is missing",
        )
    works = played.ending == "success"
    last = played.turns[-1].observation if played.turns else "no turn was played"
    return Finding(
        "an episode",
        works,
        f"the demonstration of {played.task} ended as {played.ending}"
        + ("" if works else f": {last}"),
        "" if works else "`python -m launch.doctor` says what is missing",
    )


def show(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in found:
        table.add_row(
            "[green]yes[/green]" if finding.works else "[yellow]no[/yellow]",
            finding.what,
            finding.says + (f"\n[bold]for more:[/bold] {finding.remedy}" if finding.remedy else ""),
        )
    Console(highlight=False, soft_wrap=False).print(table)


def main(
    argv: Sequence[str] | None = None, checks: Callable[[], Iterator[Finding]] = findings
) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args(argv)
    if flags.quick:
        episode = _episode()
        if not episode.works:
            print(f"launch.doctor: {episode.says}. {episode.remedy}", file=sys.stderr)
        return 0 if episode.works else 1
    found = list(checks())
    show(found)
    if flags.json:
        flags.json.write_text(json.dumps([finding._asdict() for finding in found], indent=1))
    return 0 if found[-1].works else 1


if __name__ == "__main__":
    sys.exit(main())
