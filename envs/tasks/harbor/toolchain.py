"""The programs that test scripts of published tasks install, laid over the sandbox at grading.

Such a script installs its tools from the network, which no sandbox has. Here they are there
already: Python packages in SandboxConfig.verifier_tools (a folder made by `pip install --target`),
which only verifiers see; and stand-ins for the installers, first in the tests' PATH, that say
"done" without doing anything. `find_missing` looks beforehand for what the script names, so that
nothing but what is there is ever called installed.

A Python in verifier_tools/python/bin comes before the sandbox's own; it must run there, and the
packages must be made for it.
"""

from __future__ import annotations

import dataclasses
import io
import shlex
import tarfile
from collections.abc import Sequence

from envs.rock import Sandbox, SandboxError
from envs.tasks.harbor.installs import UV_INSTALLER, Need, programs_of

PROBE_SECONDS = 60.0
DEFAULT_TOOLS = "~/.rock/tools"  # of launch.eval, and in messages
CLEAN_PATH = "/usr/local/bin:/usr/bin:/bin"

# Stand-ins may be called through links. They find Python, and the programs that they hide, by the
# variables of `lay`.
_START = '#!/bin/sh\nhere="$(readlink -f -- "$0")"\nhere="${here%/*}"\n'
_DONE = f"{_START}exit 0\n"
_FETCH = (
    _START
    + f"""\
case "$*" in *{UV_INSTALLER}*) ;; *) PATH="$ROCK_PATH" exec "${{0##*/}}" "$@" ;; esac
for bin in "$HOME/.local/bin" "$ROCK_ROOT/.local/bin"; do
    printf 'rm -rf "%s/uv" "%s/uvx" "%s/env"; mkdir -p "%s"\\n' "$bin" "$bin" "$bin" "$bin"
    printf 'ln -s "%s/uv" "%s/uvx" "%s/"; : > "%s/env"\\n' "$here" "$here" "$bin" "$bin"
done
"""
)
_RUN_TOOL = """\
case "$1" in
    python | python3 | python3.*) shift; exec "$here/python3" "$@" ;;
    pytest | pytest@* | py.test) shift; exec "$here/pytest" "$@" ;;
    *.py | -m | -c | -) exec "$ROCK_PYTHON" "$@" ;;
    *) exec "$@" ;;
esac
"""
# Goes over the options before a command; those in the first pattern take the next word.
_SKIP_OPTIONS = """\
while [ $# -gt 0 ]; do
    case "$1" in
        -w | --with | --from | -p | --python | -i | --index-url | --index | --default-index \\
            | --extra-index-url | --project | --directory | --group | --extra | --env-file)
            shift 2 ;;
        -m | -c | -) break ;;
        -*) shift ;;
        *) break ;;
    esac
done
"""
_UV = (
    _START
    + """\
while case "$1" in -*) true ;; *) false ;; esac; do shift; done
verb="$1"
shift
case "$verb" in
    venv)
        place=.venv
        for word in "$@"; do case "$word" in -* | 3 | 3.*) ;; *) place="$word" ;; esac; done
        rm -rf -- "$place"
        mkdir -p -- "$place/bin" && echo "deactivate() { :; }" > "$place/bin/activate"
        for name in python python3 pip pytest; do ln -s "$here/$name" "$place/bin/$name"; done
        ;;
    run)
"""
    + _SKIP_OPTIONS
    + _RUN_TOOL
    + """\
        ;;
    tool)
        [ "$1" = run ] || exit 0
        shift
        exec "$here/uvx" "$@"
        ;;
esac
exit 0
"""
)
_UVX = _START + _SKIP_OPTIONS + '[ "$1" = run ] && shift\n' + _RUN_TOOL
_PYTHON = (
    _START
    + """\
case "$1 $2" in "-m pytest" | "-m pip") name="$2"; shift 2; exec "$here/$name" "$@" ;; esac
exec "$ROCK_PYTHON" "$@"
"""
)
_PIP = (
    _START
    + """\
case " $* " in *" install "* | *" uninstall "*) exit 0 ;; esac
exec "$ROCK_PYTHON" -m pip "$@"
"""
)
# Only the tests' own settings and conftest.py count: those above their folder are the agent's.
_PYTEST = (
    _START
    + """\
for name in pytest.ini pyproject.toml tox.ini setup.cfg .pytest.ini; do
    [ -e "$TEST_DIR/$name" ] && exec "$ROCK_PYTHON" -m pytest --confcutdir "$TEST_DIR" "$@"
done
exec "$ROCK_PYTHON" -m pytest -c "$here/pytest.ini" --rootdir "$TEST_DIR" \\
    --confcutdir "$TEST_DIR" "$@"
"""
)
_SUDO = f'{_START}while case "$1" in -*) true ;; *) false ;; esac; do shift; done\nexec "$@"\n'
_ISOLATED = "PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1"
_SYSTEM_SHIMS = {"apt-get": _DONE, "apt": _DONE, "sudo": _SUDO}
_PYTHON_SHIMS = {
    "curl": _FETCH,
    "wget": _FETCH,
    "pip": _PIP,
    "pip3": _PIP,
    "uv": _UV,
    "uvx": _UVX,
    "pipx": _UVX,
    "python": _PYTHON,
    "python3": _PYTHON,
    "pytest": _PYTEST,
    "py.test": _PYTEST,
    "pytest.ini": "[pytest]\n",
}
# Reports each Python package that is named: "has NAME VERSION", "lacks NAME" or "unfit NAME".
_PROBE = """\
import importlib.machinery, importlib.metadata, re, sys
found = {}
for one in importlib.metadata.distributions():
    name = re.sub("[-_.]+", "-", one.metadata["Name"] or "").lower()
    found.setdefault(name, one)
for name in sys.argv[1:]:
    if name not in found:
        print("lacks", name)
        continue
    built = [str(file) for file in found[name].files or () if ".cpython-" in str(file)]
    tagged = [file for file in built if file.endswith(".so")]
    fits = [file for file in tagged if file.endswith(importlib.machinery.EXTENSION_SUFFIXES[0])]
    print("unfit" if tagged and not fits else "has", name, found[name].version)
"""


@dataclasses.dataclass(frozen=True)
class Missing:
    """What a script needs and the sandbox lacks.

    Attributes:
      need: the first need that is not met.
      programs: system packages whose programs are not there.
      packages: Python packages that are not there, as pip takes them.
      unfit: Python packages that were made for another Python.
    """

    need: Need
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()


def shims(real_installs: bool = False) -> bytes:
    """Return a tar of the stand-ins.

    Args:
      real_installs: whether Python's installers do their work, because they reach the network.
    """
    files = dict(_SYSTEM_SHIMS) if real_installs else {**_SYSTEM_SHIMS, **_PYTHON_SHIMS}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            entry.mode = 0o755
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


async def find_missing(
    sandbox: Sandbox, needs: Sequence[Need], *, by_verifier: bool, path: str = CLEAN_PATH
) -> tuple[Missing | None, list[str]]:
    """Look for what a script needs.

    Args:
      sandbox: where it will run.
      needs: of the script.
      by_verifier: whether it runs as a verifier, which sees config.verifier_tools.
      path: the PATH that it will have.

    Returns:
      What is missing, or None; and notes about packages of another version than the script asks
      for.

    Raises:
      SandboxError: a fault of the machine.
    """
    for need in needs:
        if need.kind == "network":
            return Missing(need), []
    programs = {need.name: programs_of(need.name) for need in needs if need.kind == "system"}
    versions: dict[str, str] = {}
    for need in needs:
        if need.kind == "python":
            versions[need.name] = versions.get(need.name) or need.version
    if versions:
        programs["python3"] = ("python3",)
    if not any(programs.values()):
        return None, []
    names = sorted({program for group in programs.values() for program in group})
    lacks, unfit, has = await _probe(sandbox, names, sorted(versions), by_verifier, path)
    absent = [name for name, group in programs.items() if set(group) & lacks]
    packages = tuple(f"{name}{versions[name]}" for name in versions if name in lacks)
    if not absent and not packages and not unfit:
        notes = []
        for name, version in versions.items():
            if version.startswith("==") and version != f"=={has[name]}":
                notes.append(f"the tests ask for {name}{version} and have {has[name]}")
        return None, notes
    wrong = {*absent, *lacks, *unfit}
    first = next((need for need in needs if need.name in wrong), needs[0])
    return Missing(first, tuple(absent), packages, tuple(sorted(unfit))), []


async def _probe(
    sandbox: Sandbox, programs: list[str], packages: list[str], by_verifier: bool, path: str
) -> tuple[set[str], set[str], dict[str, str]]:
    """Return (names that are missing, packages for another Python, version by package)."""
    script = f'PATH="${{VERIFIER_TOOLS:+$VERIFIER_TOOLS/python/bin:}}"{shlex.quote(path)}\n'
    for program in programs:
        script += f"command -v {shlex.quote(program)} > /dev/null || echo lacks {program}\n"
    if packages:
        arguments = shlex.join([_PROBE, *packages])
        script += f'export PYTHONPATH="$VERIFIER_TOOLS" {_ISOLATED}\npython3 -c {arguments}\n'
    if by_verifier:
        result = await sandbox.verify(script, timeout=PROBE_SECONDS)
    else:
        result = await sandbox.execute(script, timeout=PROBE_SECONDS)
    lacks = set()
    unfit = set()
    has = {}
    for row in result.stdout.splitlines():
        answer, _, rest = row.partition(" ")
        name, _, version = rest.partition(" ")
        if answer == "has":
            has[name] = version
        else:
            (unfit if answer == "unfit" else lacks).add(name)
    if "python3" not in lacks and set(packages) - {*has, *lacks, *unfit}:
        raise SandboxError(f"the sandbox's python3 does not run: {result.stderr.strip()[-300:]}")
    return lacks, unfit, has


def explain(missing: Missing, script: str, tools: str, is_container: bool) -> str:
    """Return what a script's user can do about what is missing.

    Args:
      missing: what is missing.
      script: what needs it: "the tests" or another.
      tools: the folder of the verifier's tools; "" where the script cannot use them.
      is_container: whether the script runs in a container of the task's image.
    """
    command = f"`{missing.need.command}`"
    if missing.need.kind == "network":
        return f"{command} needs the network, and the sandbox has none"
    where = "the task's image" if is_container else "this machine"
    if missing.programs:
        names = " ".join(missing.programs)
        return f"{command}: {where} lacks {names}; install it there, since {script} cannot"
    quoted = shlex.join(missing.packages or missing.unfit)
    if not tools:
        return f"{command}: the python3 of {where} lacks {quoted}; install it there"
    lacks = "lack" if missing.packages else "have for another Python"
    return (
        f"{command}: the verifier's tools {lacks} {quoted}; add it with"
        f" `pip install --target {tools} {quoted}`, or let the tests install it by verifier_egress"
    )


def lay(sandbox_path: str, archive: str, root: str, path: str) -> str:
    """Return shell text that unpacks the stand-ins and sets the variables of their scripts.

    Args:
      sandbox_path: a folder for them, as a shell word; it is made.
      archive: the tar of `shims`, as a shell word.
      root: where the task's /root is, as a shell word.
      path: the PATH without them, as a shell word.
    """
    return f"""\
mkdir -p {sandbox_path} && tar -xf {archive} -C {sandbox_path} || exit 97
ROCK_PATH={path}
ROCK_ROOT={root}
ROCK_PYTHON="$(PATH="$ROCK_PATH" command -v python3)"
"""
