"""The procedural terminal curriculum.

Each family of shell tasks has a generator, a verifier and a scripted demonstrator.

    task = make_task("count", train_seed(17))
    env = make("terminal/count", seed=17)          # envs.gem.make
    env = make("terminal/git_merge", seed=3)       # a wide family: see FAMILY_TABLE

The tiny model is trained on FAMILIES and measured on HELD_OUT_FAMILIES, which fit a context of a
few hundred tokens. WIDE_FAMILIES are for larger models. FAMILY_TABLE gives the domain, the
difficulty (1 to 5) and the required programs of every family.
"""

from envs.gem import register
from envs.tasks.terminal import families  # noqa: F401  (registers them)
from envs.tasks.terminal.registry import DOMAINS, FAMILY_TABLE, WIDE_LIMITS, FamilyInfo
from envs.tasks.terminal.task import (
    EVAL_SEED_START,
    WORDS,
    Task,
    eval_seed,
    held_out_families,
    make_task,
    train_seed,
    training_families,
    wide_families,
)

FAMILIES = training_families()
HELD_OUT_FAMILIES = held_out_families()
WIDE_FAMILIES = wide_families()

for _name in FAMILIES + HELD_OUT_FAMILIES:
    register(f"terminal/{_name}", "envs.tasks.terminal.env:TerminalEnv", family=_name)
for _name in WIDE_FAMILIES:
    register(
        f"terminal/{_name}", "envs.tasks.terminal.env:TerminalEnv", family=_name, **WIDE_LIMITS
    )

__all__ = [
    "DOMAINS",
    "EVAL_SEED_START",
    "FAMILIES",
    "FAMILY_TABLE",
    "HELD_OUT_FAMILIES",
    "WIDE_FAMILIES",
    "WORDS",
    "FamilyInfo",
    "Task",
    "eval_seed",
    "make_task",
    "train_seed",
]
