# The project's commands. Python 3.11 or newer, git and make are enough; the first run makes .venv and installs into it.
#
#   make train [CONFIG=experiments/ipa.py:PRESET] [WORKDIR=DIR] [ARGS="--config.key=value ..."]
#   make test  [ARGS="tests/rome -x"]     the fast tests
#   make test-all                         the slow ones too, and the live comparison with transformers
#   make clean                            removes .venv and caches; results under runs/ stay
#
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from. A job's failure is make's failure (status 2).
# ACCELERATOR=tpu, cuda or cpu chooses the jax that is installed; without it the machine's devices decide.

SHELL := /bin/bash
CONFIG = experiments/ipa.py
WORKDIR =
ARGS =
PYTHON =
ACCELERATOR =

.PHONY: help train test test-all environment environment-all clean

help:
	@sed -n '3,8s/^#   /  /p; 8s/^# \(P.*\)/\n\1/p; 9s/^# \(A.*\)/\1/p' Makefile

# `exec`: the job takes the place of its shell, so a signal meets one process and its exit status is the recipe's.
train: environment
	@.venv/bin/python -m launch.doctor --quick || true; exec .venv/bin/python -m launch.train --config='$(CONFIG)' $(if $(WORKDIR),--workdir='$(WORKDIR)') $(ARGS)

test: environment
	@exec .venv/bin/python -m pytest $(ARGS)

test-all: environment-all
	@exec .venv/bin/python -m pytest -m "slow or not slow" $(ARGS)

environment:
	@PYTHON='$(PYTHON)' ACCELERATOR='$(ACCELERATOR)' bash launch/setup.sh requirements.txt

environment-all:
	@PYTHON='$(PYTHON)' ACCELERATOR='$(ACCELERATOR)' bash launch/setup.sh requirements.txt tests/requirements-live.txt

clean:
	rm -rf .venv .cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
