# The project's commands. Python 3.11 or newer, git and make are enough; the first run makes .venv and installs into it.
#
#   make train [CONFIG=experiments/ipa.py:PRESET] [WORKDIR=DIR] [ARGS="--config.key=value ..."]
#   make check                            format, lint and types
#   make test  [ARGS="tests/rome -x"]     the fast tests
#   make test-long                        the tests of several seconds each, which CI runs too
#   make test-all                         the slow ones too, the live comparisons, and coverage
#   make format                           apply the formatter and the safe fixes of the linter
#   make docs                             build the documentation into site/
#   make sglang MODEL=DIR [ARGS="--port 30000 --dry-run"]   an SGLang server for rollouts, in an environment of its own (.venv-sglang)
#   make clean                            remove .venv and caches; results under runs/ stay
#
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from. A job's failure is make's failure (status 2).
# ACCELERATOR=tpu, cuda or cpu chooses the jax that is installed; without it the machine's devices decide.

SHELL := /bin/bash
CONFIG = experiments/ipa.py
WORKDIR =
MODEL =
ARGS =
PYTHON =
ACCELERATOR =
SETUP = PYTHON='$(PYTHON)' ACCELERATOR='$(ACCELERATOR)' bash launch/setup.sh
DEV = requirements.txt requirements-dev.txt
# Two workers a core, since many tests wait, as far as memory goes: each takes up to 3.5 GB (ARGS="-n 8" chooses).
WORKERS = $(shell awk -v most=$$((2 * $$(nproc))) '/MemAvailable/ {n = int($$2 / 3500000); print n < 1 ? 1 : n < most ? n : most}' /proc/meminfo 2>/dev/null || echo 2)
# Tests of one file stay together: they share processes and compiled programs. conftest.py orders the files.
PARALLEL = --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

.PHONY: help train check format test test-long test-all docs sglang clean

help:
	@sed -n '3,11s/^\#   /  /p; 13s/^\# \(P.*\)/\n\1/p; 14s/^\# \(A.*\)/\1/p' Makefile

# `exec`: the job takes the place of its shell, so a signal meets one process and its exit status is the recipe's.
train:
	@$(SETUP) requirements.txt
	@.venv/bin/python -m launch.doctor --quick || true; exec .venv/bin/python -m launch.train --config='$(CONFIG)' $(if $(WORKDIR),--workdir='$(WORKDIR)') $(ARGS)

check:
	@$(SETUP) $(DEV)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format:
	@$(SETUP) $(DEV)
	.venv/bin/ruff check --fix --exit-zero .
	.venv/bin/ruff format .

test:
	@$(SETUP) $(DEV)
	@exec .venv/bin/python -m pytest $(PARALLEL) $(ARGS)

test-long:
	@$(SETUP) $(DEV)
	@exec .venv/bin/python -m pytest $(PARALLEL) -m "long and not slow" $(ARGS)

# The CUDA plugin of this jax lies beside .venv: inside, it would look for a GPU in every process.
test-all:
	@$(SETUP) $(DEV) tests/requirements-live.txt
	@[ "$$(uname -sm)" != "Linux x86_64" ] || [ -d .cache/cuda/jax_plugins ] || { jax=$$(.venv/bin/python -c "import jax; print(jax.__version__)") && \
	  .venv/bin/python -m pip install -qq --no-deps --target .cache/cuda jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax; }
	@exec .venv/bin/python -m pytest $(PARALLEL) -m "long or not long" --cov --cov-report=term $(ARGS)

docs:
	@$(SETUP) requirements.txt requirements-docs.txt
	@exec .venv/bin/python -m mkdocs build --strict $(ARGS)

# The mark is made last: an installation that was cut off is done again. A dry run needs no SGLang.
sglang:
	@test -n '$(MODEL)' || { echo "make sglang needs MODEL=DIR, a Hugging Face checkpoint directory"; exit 2; }
	@[ -e .venv-sglang/installed ] || [[ ' $(ARGS) ' == *' --dry-run '* ]] || { $(or $(PYTHON),python3) -m venv .venv-sglang && \
	  .venv-sglang/bin/pip install -r requirements-sglang.txt && touch .venv-sglang/installed; }
	@python=.venv-sglang/bin/python; [ -x $$python ] || python=$(or $(PYTHON),python3); exec $$python launch/sglang_server.py --model_path '$(MODEL)' $(ARGS)

clean:
	rm -rf .venv .venv-sglang .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage site *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
