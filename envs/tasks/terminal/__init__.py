"""The procedural terminal curriculum: families of small shell tasks, each with a generator, a verifier and a scripted expert.

    task = make_task("count", train_seed(17))
    env = make("terminal/count", seed=17)          # envs.gem.make
"""

from envs.gem import register
from envs.tasks.terminal import files, notes, numbers, scripts, text, unseen  # noqa: F401  (each registers its families)
from envs.tasks.terminal.task import EVAL_SEED_START, WORDS, Task, eval_seed, held_out_families, make_task, train_seed, training_families

FAMILIES = training_families()
HELD_OUT_FAMILIES = held_out_families()

for _name in FAMILIES + HELD_OUT_FAMILIES:
    register(f"terminal/{_name}", "envs.tasks.terminal.env:TerminalEnv", family=_name)

__all__ = ["EVAL_SEED_START", "FAMILIES", "HELD_OUT_FAMILIES", "Task", "WORDS", "eval_seed", "make_task", "train_seed"]
