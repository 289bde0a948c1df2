#!/usr/bin/env bash
# Makes .venv ready for the requirement files named as arguments. Needs no system package but Python's own venv.
# Does nothing, in milliseconds, when all is there. PYTHON names the interpreter to use; without it the first fitting one is taken.
# ACCELERATOR=tpu, cuda or cpu chooses requirements-tpu.txt, requirements-cuda.txt or neither; without it the machine's devices decide.
set -euo pipefail
cd "$(dirname "$0")/.."
exec 9<launch/setup.sh && flock 9  # several `make train` started at once: one installs, the others wait

log=$(mktemp)
trap 'rm -f "$log"' EXIT
say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

logged() { "$@" >>"$log" 2>&1 9<&-; }

# apt_install PACKAGE...: as root, or through sudo where it asks for no password. Fails where neither is possible.
apt_install() {
  command -v apt-get >/dev/null || return 1
  local root=(env)
  if [ "$(id -u)" != 0 ]; then sudo -n true 2>/dev/null || return 1; root=(sudo -n env); fi
  local install=("${root[@]}" DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -qy --no-install-recommends "$@")
  logged "${install[@]}" || { logged "${root[@]}" apt-get update -q && logged "${install[@]}"; }
}

keeps_image_jax() { grep -qs 'include-system-site-packages = true' .venv/pyvenv.cfg; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.12 python3.13 python3.11 python3.14}; do
    if new_enough "$name"; then command -v "$name"; return; fi
  done
  name=${PYTHON:-python3}
  fail "Python 3.11 or newer is needed, and $name is $(version_of "$name" || echo missing)." \
    "Install one (on Debian or Ubuntu: apt-get install python3.12 python3.12-venv) or name it: make ... PYTHON=/path/to/python3.12"
}

# An accelerator image brings a jax that knows its chips: keep it if requirements.txt allows its version. Prints that version, or nothing.
image_jax() {
  "$1" - <<'PYTHON'
import importlib.metadata, re, sys
names = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
chips = any(name.startswith(("jax-cuda", "jax-rocm", "libtpu")) for name in names)
allowed = re.search(r"^jax>=([\d.]+),<([\d.]+)", open("requirements.txt").read(), re.MULTILINE)
number = lambda version: tuple(int(part) for part in re.findall(r"\d+", version)[:2])
in_reach = sys.prefix == sys.base_prefix  # a virtual environment cannot see into another one
if in_reach and chips and allowed and "jax" in names and number(allowed[1]) <= number(names["jax"]) < number(allowed[2]):
    print(names["jax"])
PYTHON
}

# The chip that this machine's device files show: tpu, cuda or cpu. ROME_DEVICES stands for the root they are looked for under.
find_accelerator() {
  local under=${ROME_DEVICES:-} vendor
  if compgen -G "$under/dev/nvidia[0-9]*" >/dev/null; then echo cuda; return; fi
  if compgen -G "$under/dev/accel*" >/dev/null || compgen -G "$under/dev/vfio/[0-9]*" >/dev/null; then
    for vendor in "$under"/sys/bus/pci/devices/*/vendor; do
      if [ "$(cat "$vendor" 2>/dev/null)" = 0x1ae0 ]; then echo tpu; return; fi  # Google
    done
  fi
  echo cpu
}

# Three ways, from the usual to the rare: Debian without python3-venv and Colab lack ensurepip, but one of the other two is there.
make_environment() {
  local python=$1 options=() jax
  jax=$(image_jax "$python")
  if [ -n "$jax" ]; then
    say "keeping the jax $jax that $python brings for its accelerator"
    options=(--system-site-packages)
  fi
  rm -rf .venv
  if logged "$python" -m venv "${options[@]}" .venv; then return; fi
  rm -rf .venv
  if "$python" -m pip --version >/dev/null 2>&1 && logged "$python" -m venv --without-pip "${options[@]}" .venv &&
    logged "$python" -m pip --python .venv/bin/python install -qq pip; then return; fi
  rm -rf .venv
  if apt_install "python$(version_of "$python")-venv" && logged "$python" -m venv "${options[@]}" .venv; then return; fi
  rm -rf .venv
  tail -5 "$log" >&2
  fail "$python ($(version_of "$python")) can make no virtual environment. Install its venv module: apt-get install python$(version_of "$python")-venv"
}

if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ] && [ "$(version_of "$PYTHON")" != "$(version_of .venv/bin/python)" ]; then
  fail ".venv has Python $(version_of .venv/bin/python) and PYTHON=$PYTHON is $(version_of "$PYTHON" || echo missing)." \
    "Run 'make clean' first, or leave PYTHON out."
fi
if ! .venv/bin/python -c "import pip" 2>/dev/null; then
  python=$(find_python)
  say "making .venv with $python ($(version_of "$python"))"
  make_environment "$python"
fi

accelerator=${ACCELERATOR:-$(find_accelerator)}
files=("$@")
case $accelerator in
  cpu) ;;
  tpu | cuda)
    keeps_image_jax || files+=("requirements-$accelerator.txt") ;;  # an image's own jax knows its chips already
  *) fail "ACCELERATOR=$accelerator is none of tpu, cuda and cpu. Name one, or leave it out: the machine's devices decide." ;;
esac

for file in "${files[@]}"; do
  installed=.venv/$(basename "$file")  # a copy of what was installed: stale as soon as the file differs
  if cmp -s "$file" "$installed"; then continue; fi
  say "installing the packages of $file into .venv (one to three minutes where nothing is cached)"
  SECONDS=0
  jax=$(.venv/bin/python -c 'import importlib.metadata as m; print("jax==" + m.version("jax"))' 2>/dev/null || true)
  if keeps_image_jax; then echo "$jax"; fi >.venv/constraints.txt
  .venv/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off \
    --requirement "$file" --constraint .venv/constraints.txt 9<&- ||
    fail "pip could not install $file (its reason stands above). Run the same command again once that is mended."
  cp "$file" "$installed"
  say "installed in $SECONDS s"
done
