"""Checks of what this machine can do for training, each with its remedy.

Each check tries its mechanism. The last one plays a demonstration in a sandbox, from task to
verdict: where that fails, nothing can be trained.
"""

from __future__ import annotations

import asyncio
import glob
import importlib.metadata
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from envs.gem.episode import EnvironmentFault, play_demonstration
from envs.rock import Sandbox, SandboxConfig, SandboxError, probe
from envs.rock.config import TIERS
from envs.rock.docker.probe import probe_docker
from envs.rock.host import cgroups
from envs.rock.tiers import TierReport
from envs.tasks.terminal import FAMILIES, train_seed
from envs.tasks.terminal.env import TerminalEnv

SECONDS = 60.0
DEVICE_SECONDS = 240.0
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain")
LOOK_AT_DEVICES = (
    "import jax, rome.serve.server; print(jax.default_backend(), len(jax.devices()),"
    " jax.devices()[0].device_kind)"
)
POLICY = "experiments/ipa.py"  # whose engine and mesh a training run has by default
ASK_DOCTOR = "`python -m launch.doctor` says what is missing"


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
      what: was checked.
      works: whether it does.
      says: what was found.
      remedy: what to do for more; "" where nothing is missing.
    """

    what: str
    works: bool
    says: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """Yield the result of each check as soon as it is known; the last is the episode's."""
    yield check_packages()
    yield check_devices()
    yield check_tokenizer()
    for tier in TIERS:
        yield check_tier(tier)
    yield check_choice()
    yield check_cgroups()
    yield check_snapshots()
    yield check_docker()
    yield check_episode()


def check_packages() -> Finding:
    """Look for the packages that training needs."""
    found = []
    missing = []
    for name in PACKAGES:
        version = _version(name)
        if version:
            found.append(f"{name} {version}")
        else:
            missing.append(name)
    says = f"Python {platform.python_version()}; {', '.join(found)}"
    if not missing:
        return Finding("packages", True, says)
    remedy = f"missing: {', '.join(missing)}; `make environment` installs them"
    return Finding("packages", False, says, remedy)


def check_devices() -> Finding:
    """Look for devices that JAX can use, import the engine, and say who gets which device.

    It runs in a subprocess: initialising JAX here would hold the chip.
    """
    what = "accelerator, engine"
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOOK_AT_DEVICES],
            capture_output=True,
            text=True,
            timeout=DEVICE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        says = f"JAX found no device within {DEVICE_SECONDS:.0f} s"
        return Finding(what, False, says, "is another process holding the chip?")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended without a message"]
        return Finding(
            what, False, lines[-1], "the environment is damaged: `make clean environment`"
        )
    backend, count, kind = done.stdout.split(maxsplit=2)
    unused = _chips_of_machine() if backend == "cpu" else []
    remedy = ""
    if unused:
        accelerator = "cuda" if unused[0] == "GPU" else "tpu"
        remedy = (
            f"there is a {unused[0]}, and this JAX has no backend for it: `make clean`, then `make"
            f" environment ACCELERATOR={accelerator}`"
        )
    plural = "s" if count != "1" else ""
    from rome.stages.schema import load_config
    from rome.train.devices import divide_for, find_machine

    division = divide_for(load_config(POLICY, "tiny"), find_machine(), True, os.environ)
    says = f"{count} {backend} device{plural} ({kind.strip()}); in training, {division.says}"
    return Finding(what, not unused, says, remedy)


def check_tokenizer() -> Finding:
    """Encode a text and decode it again."""
    from rome.model.tokenizer import TINY, Tokenizer

    tokenizer = Tokenizer.load(TINY)
    text = "ls -la <|im_end|> naïve"
    if tokenizer.decode(tokenizer.encode(text)) != text:
        remedy = "the package tokenizers is damaged: `make clean environment`"
        return Finding("tokenizer", False, "a text changes when it is encoded and decoded", remedy)
    says = f"{tokenizer.vocab_size} tokens, text comes back as it went in"
    return Finding("tokenizer", True, says)


def check_tier(tier: str) -> Finding:
    """Start a sandbox of one tier of the embedded backend."""
    what = f"sandbox tier {tier}"
    report = probe(tier=tier)
    if report.tier is None:
        return Finding(what, False, report.missing[0].reason, report.missing[0].remedy)
    remediable = list(report.missing)
    if tier == "landlock":  # its other gaps have no remedy
        remediable = [item for item in report.missing if item.guarantee in ("memory", "cpu")]
    remedy = remediable[0].remedy if remediable else ""
    return Finding(what, True, _describe_guarantees(report), remedy)


def check_choice() -> Finding:
    """Find the tier that a sandbox gets here by default."""
    report = probe("best_available")
    if report.tier is None:
        says = "none of the embedded backend; backend='docker' or 'remote' may do"
        return Finding("sandboxes", False, says, report.missing[0].remedy)
    try:
        report.require("required")
    except SandboxError:
        lost = ", ".join(item.guarantee for item in report.missing)
        says = (
            f"the embedded backend's tier {report.tier}, and only under"
            f" isolation='best_available': not enforced are {lost}"
        )
        return Finding("sandboxes", True, says, report.missing[0].remedy)
    says = f"the embedded backend's tier {report.tier}; isolation='required' is available"
    return Finding("sandboxes", True, says)


def check_cgroups() -> Finding:
    """Look for a cgroup that sandboxes may be made in."""
    place, reason = cgroups.find()
    if place is None:
        remedy = "run as root, or as an ordinary user under `systemd-run --user --scope`"
        return Finding("cgroups", False, reason, remedy)
    return Finding("cgroups", True, f"version {place.version}: {', '.join(sorted(place.parents))}")


def check_snapshots() -> Finding:
    """Fork a sandbox: its workspace is an overlay of the snapshot, or a copy."""
    try:
        kept, mounts = asyncio.run(asyncio.wait_for(_fork(), SECONDS))
    except (TimeoutError, SandboxError) as error:
        says = str(error) or f"a fork did not end within {SECONDS:.0f} s"
        return Finding("snapshots", False, says, "see the sandbox tiers above")
    works = kept == "kept\n"
    if any(" /workspace " in line and " overlay " in line for line in mounts.splitlines()):
        return Finding("snapshots", works, "a fork lies over its snapshot, copy-on-write")
    remedy = "copy-on-write takes the namespaces tier and Linux 6.6"
    return Finding("snapshots", works, "a fork copies its snapshot", remedy)


def check_docker() -> Finding:
    """Look for a Docker engine that can run sandboxes."""
    report = probe_docker()
    if report.tier is None:
        says = f"{report.missing[0].reason}; only backend='docker' needs it"
        return Finding("Docker", False, says, report.missing[0].remedy)
    remedy = report.missing[0].remedy if report.missing else ""
    return Finding("Docker", True, _describe_guarantees(report), remedy)


def check_episode() -> Finding:
    """Play the scripted solution of one task: sandbox, commands, verifier."""
    what = "an episode"
    config = SandboxConfig(isolation="best_available")
    env = TerminalEnv(f"{FAMILIES[0]}/{train_seed(1)}", config)
    playing = play_demonstration(env, random.Random(0), 0.0)
    try:
        played = asyncio.run(asyncio.wait_for(playing, SECONDS))
    except (TimeoutError, SandboxError, EnvironmentFault, OSError) as error:
        says = str(error) or f"it did not end within {SECONDS:.0f} s"
        return Finding(what, False, says, ASK_DOCTOR)
    says = f"the demonstration of {played.task} ended as {played.ending}"
    if played.ending == "success":
        return Finding(what, True, says)
    last = played.turns[-1].observation if played.turns else "no turn was played"
    return Finding(what, False, f"{says}: {last}", ASK_DOCTOR)


def _version(package: str) -> str:
    """Return the version of an installed package, "" where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _chips_of_machine() -> list[str]:
    """Return the kinds of accelerators that have a device file."""
    patterns = {"GPU": "/dev/nvidia[0-9]*", "TPU": "/dev/accel*"}
    return [kind for kind, pattern in patterns.items() if glob.glob(pattern)]


def _describe_guarantees(report: TierReport) -> str:
    """Describe what a tier enforces and what it does not."""
    text = f"enforces {', '.join(sorted(report.guarantees))}"
    if report.missing:
        text += f"; not {', '.join(item.guarantee for item in report.missing)}"
    return text


async def _fork() -> tuple[str, str]:
    """Fork a sandbox; return a file of the snapshot and the mounts, both as the fork sees them."""
    config = SandboxConfig(isolation="best_available")
    async with Sandbox(config) as first:
        await first.execute("echo kept > f")
        snapshot = await first.snapshot()
        async with Sandbox(config, snapshot) as second:
            kept = (await second.execute("cat f")).stdout
            mounts = (await second.execute("cat /proc/self/mountinfo 2>/dev/null")).stdout
        await snapshot.delete()
    return kept, mounts
