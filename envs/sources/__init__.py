"""Sources of tasks: one grammar for training, evaluation, validation and synthesis.

terminal                       the terminal curriculum; `terminal:FAMILIES[:N]` names its families
worlds[:NAMES[:N]]             travel, shop, gui; a name is a world, or a world and a level
                               (worlds:shop/hard)
games[:NAMES[:N]]              frozen_lake, sokoban, wordle, ...
problems[:NAMES[:N]]           math, code, math/dice, code/postfix-hard
repair[:PACKAGES[:N]]          packages with a bug each (repair::100)
safety[:NAMES[:N]][+BASE]      tasks of any of these with an injection (envs.safety);
                               safety:repository+terminal:wide
agentdojo[:SUITES[:N]]         AgentDojo's suites, where its package is installed
bfcl:CATEGORY                  BFCL's own files, or a file of that form
harbor, harbor/TASK            the task folders that ship here
pro                            200 generated tasks in 8 domains, proven
FOLDER                         Harbor or Terminal-Bench 1 tasks, or one task
FILE.json[:NAME[@VERSION]]     a registry of Harbor's
FILE.parquet, FILE.jsonl       SWE-bench rows, or one archive a task (envs.tasks.datasets)
gem:ID                         an environment that envs.gem.make knows, gem-llm's included
package.module:Name            an environment of GEM, gymnasium or verifiers, from anybody's
FILE.py:Name                   package or file (envs.sources.own)
0.7*terminal + 0.3*games:wordle    a mixture; the weights are shares of what training draws

    source = open_source("worlds:shop")
    task = source.train("shop/easy", 17)          # never evaluated
    source.evaluation(per_family=4)               # never trained on
    env = task.make_env(SandboxConfig())
"""

from __future__ import annotations

import math
import re

from envs.gem import core
from envs.sources import dojo, files, generated, own, safety
from envs.sources.source import (
    EVAL_SHARE,
    TRAIN_SEEDS,
    Finite,
    Generated,
    Mixture,
    Share,
    Source,
    overlap,
)
from envs.sources.task import Content, Settings, SourceError, Task, dataset_digest
from envs.tasks.harbor import TaskError

GRAMMAR = (
    "terminal[:FAMILIES[:N]], worlds[:NAMES[:N]], games[:NAMES[:N]], problems[:NAMES[:N]],"
    " repair[:PACKAGES[:N]], safety[:NAMES[:N]][+BASE], agentdojo[:SUITES[:N]], bfcl:FILE, pro,"
    " harbor, harbor/TASK, a folder, FILE.json[:NAME[@VERSION]], FILE.parquet, FILE.jsonl, gem:ID,"
    " package.module:Name, FILE.py:Name, or a mixture '0.7*A + 0.3*B'"
)
_PLUS = re.compile(r"\s+\+\s+|\s*\+\s*(?=[\d.]+\s*\*)")
_WEIGHTED = re.compile(r"(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*\s*(?P<spec>\S.*)")
_OWN = re.compile(r"[\w.]+:\w+|.+\.py:\w+")


def open_source(
    spec: str,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    faults: list[TaskError] | None = None,
    eval_share: float = EVAL_SHARE,
) -> Source:
    """Return the source that a spec names; the module describes the grammar.

    Args:
      spec: the text.
      seed: chooses the tasks of evaluations, and the instances of generated sets.
      settings: how its tasks are played.
      faults: where given, malformed tasks are appended to it instead of raised.
      eval_share: of a finite set, how much is evaluated and never trained on.

    Raises:
      SourceError: there is no such source.
      TaskError: a task is malformed; the message has file, row and line.
    """
    if seed < 0:
        raise SourceError(f"seed {seed} is negative; instances are drawn from seeds of 0 and more")
    settings = settings or Settings()
    parts = _PLUS.split(spec.strip())
    weighted = [_WEIGHTED.fullmatch(part) for part in parts]
    if len(parts) == 1 and weighted[0] is None:
        return _open_one(parts[0], seed, settings, faults, eval_share)
    weights = [float(match["weight"]) if match else 0.0 for match in weighted]
    total = sum(weights)
    # A sum beyond the range of floats would leave a share of 0 or nan to its sources.
    if not all(weights) or not math.isfinite(total) or not all(one / total for one in weights):
        raise SourceError(
            f"mixture {spec!r} is not 'WEIGHT*SOURCE + WEIGHT*SOURCE' with weights above 0, such as"
            " '0.7*terminal + 0.3*games:wordle'"
        )
    sources = [
        _open_one(match["spec"], seed, settings, faults, eval_share) for match in weighted if match
    ]
    if len(sources) == 1:
        return sources[0]
    shares = [weight / total for weight in weights]
    return Mixture(spec, list(zip(shares, sources, strict=True)))


def load_tasks(
    spec: str,
    seed: int = 0,
    faults: list[TaskError] | None = None,
    settings: Settings | None = None,
) -> list[Task]:
    """Return all tasks that a spec names, see `open_source`."""
    return open_source(spec, seed=seed, settings=settings, faults=faults).tasks()


def _open_one(
    spec: str,
    seed: int,
    settings: Settings,
    faults: list[TaskError] | None,
    eval_share: float,
) -> Source:
    kind, _, rest = spec.partition(":")
    if safety.is_safety(spec):
        return safety.open_safety(
            spec, seed, settings, lambda base: _open_one(base, seed, settings, faults, eval_share)
        )
    if kind == "agentdojo":
        return dojo.open_agentdojo(spec)
    if kind == "terminal":
        return generated.open_terminal(spec, seed, settings)
    if kind in generated.KINDS:
        ids = generated.find_ids(kind, rest.partition(":")[0])
        return generated.open_registered(spec, kind, ids, seed, settings)
    if kind == "gem" and rest:
        return _open_gem(spec, rest, seed, settings, eval_share)
    if kind == "repair":
        return Finite(spec, files.load_repair(spec, seed, settings, faults), eval_share)
    if kind == "bfcl" and rest:
        return Finite(spec, files.load_bfcl(spec), eval_share)
    if spec == "pro":
        return Finite(spec, files.load_pro_set(settings), eval_share)
    if files.names_files(spec):
        return Finite(spec, files.load_folder(spec, settings, faults), eval_share)
    if _OWN.fullmatch(spec):
        made = own.import_named(spec, settings.folders)
        return own.open_own(spec, made, seed, settings, eval_share)
    raise SourceError(
        f"dataset {spec!r} is neither a folder, nor a file of a known kind, nor known by name. It"
        f" is one of: {GRAMMAR}"
    )


def _open_gem(spec: str, env_id: str, seed: int, settings: Settings, eval_share: float) -> Source:
    if env_id.startswith("terminal/"):
        return generated.open_terminal(
            f"terminal:{env_id.removeprefix('terminal/')}", seed, settings
        )
    if env_id in core.registered():
        return generated.open_registered(spec, "gem", [env_id], seed, settings)
    return own.open_own(spec, lambda: core.make(env_id), seed, settings, eval_share)


__all__ = [
    "EVAL_SHARE",
    "GRAMMAR",
    "TRAIN_SEEDS",
    "Content",
    "Finite",
    "Generated",
    "Mixture",
    "Settings",
    "Share",
    "Source",
    "SourceError",
    "Task",
    "dataset_digest",
    "load_tasks",
    "open_source",
    "overlap",
]
