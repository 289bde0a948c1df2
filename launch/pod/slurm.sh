#!/usr/bin/env bash
# The batch script of a SLURM job: one process of launch.train in each task. `python -m launch.pod slurm` submits it; by hand:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --signal=TERM@300 launch/pod/slurm.sh --config=... --workdir=...
# SLURM starts a copy of this file: the code is where sbatch was called.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is started by sbatch}"

# One task that fails ends all: the others would wait for it. launch.train finds its place in SLURM_PROCID and SLURM_STEP_NODELIST.
exec srun --kill-on-bad-exit=1 --label .venv/bin/python -m launch.train "$@"
