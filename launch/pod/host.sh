#!/usr/bin/env bash
# Runs on each TPU VM, in the unpacked code: mounts the shared file system, installs, and starts this host's process of launch.train, detached.
# usage: host.sh MOUNT_COMMAND TRAIN_ARGUMENT...      log: train.log, process id: train.pid
set -euo pipefail
cd "$(dirname "$0")/../.."

mount_command=$1
shift
if [ -s train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null; then
  echo "host.sh: a run (process $(cat train.pid)) is going on here; stop it first: kill -TERM $(cat train.pid)" >&2
  exit 1
fi
bash -c "$mount_command"

# The TPU images bring Python 3.10, which is too old. uv fetches a newer one without root.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  command -v uv >/dev/null || export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install --user --quiet uv
  uv python install --quiet 3.12
  PYTHON=$(uv python find 3.12)
  export PYTHON
fi
ACCELERATOR=tpu bash launch/setup.sh requirements.txt

setsid nohup .venv/bin/python -m launch.train "$@" >train.log 2>&1 </dev/null &
echo $! >train.pid
echo "host.sh: $(hostname): started as process $!"
