r"""Makes verified sets of tasks, and filters trajectories.

python -m launch.synth --families all:4 --out OUT          # generators: no model, no network
python -m launch.synth --packages DIR,DIR --out OUT        # bugs in real packages
python -m launch.synth --repositories DIR --out OUT        # commits: fails before, passes after
python -m launch.synth --tools sort,uniq,nl --out OUT      # options of a command's own help
python -m launch.synth --pro --out OUT --seed 7            # a private set like `pro`: 200 tasks
python -m launch.synth --families logs:10 --attempts 4 --band 0.1,0.9 \
    --endpoint http://127.0.0.1:8000/v1 --model NAME --out OUT
python -m launch.synth --filter DIR --tasks OUT/tasks --out FILTERED   # four stages
python -m launch.synth --funnel FILTERED                   # what each stage removed
python -m launch.synth --index FILE --runs_of OUT,OUT2     # seeds of accepted generated tasks
python -m launch.synth --fakes 20 --out OUT                # measures the filter on planted fakes

Writes OUT/tasks (Harbor folders: launch.eval --dataset OUT/tasks) and OUT/card.json. After a kill
the same command goes on where it was. docs/synthesis.md describes both.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from launch._main import reject_arguments, run_command

if TYPE_CHECKING:
    from rome.synth.models import Endpoints

OUT = flags.DEFINE_string("out", None, "folder of the run")
FAMILIES = flags.DEFINE_string("families", "", "generated tasks: NAMES:N or all:N")
PACKAGES = flags.DEFINE_list("packages", [], "folders of Python packages")
REPOSITORIES = flags.DEFINE_list("repositories", [], "folders of git repositories")
TOOLS = flags.DEFINE_list("tools", [], "commands of the sandbox whose --help is read")
COUNT = flags.DEFINE_integer("count", 10, "tasks of each package, repository, tool", lower_bound=1)
KEEP = flags.DEFINE_integer("keep", 0, "tasks of each domain at most; 0: all", lower_bound=0)
PRO = flags.DEFINE_bool("pro", False, "a set of 200 tasks in 8 domains; another one for each seed")
MUTANTS = flags.DEFINE_integer("mutants", 12, "of each reference solution", lower_bound=1)
ORACLE_RUNS = flags.DEFINE_integer("oracle_runs", 3, "of each reference solution", lower_bound=1)
ATTEMPTS = flags.DEFINE_integer(
    "attempts", 0, "of the Trajectory agent at each task", lower_bound=0
)
BAND = flags.DEFINE_list("band", ["0", "1"], "least and most pass rate of an accepted task")
LICENCES = flags.DEFINE_bool("licences", True, "use only sources with a permissive licence")
ENDPOINT = flags.DEFINE_string("endpoint", "", "URL of a chat-completions API for the agents")
MODEL = flags.DEFINE_string("model", "", "its model")
API_KEY_ENV = flags.DEFINE_string("api_key_env", "OPENAI_API_KEY", "variable with its key")
ISOLATION = flags.DEFINE_string("isolation", "best_available", "of the sandboxes")
CONCURRENCY = flags.DEFINE_integer("concurrency", 2, "sandboxes at once", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of everything", lower_bound=0)
FILTER = flags.DEFINE_string("filter", "", "folder of trajectories (ATIF) to be filtered")
TASKS = flags.DEFINE_string("tasks", "", "data set of their tasks")
LABELS = flags.DEFINE_string("labels", "", "decisions on some of them that calibrate the judge")
RUNS = flags.DEFINE_integer("runs", 2, "re-runs of each trajectory", lower_bound=1)
FUNNEL = flags.DEFINE_string("funnel", "", "folder of a filter: print and plot what it removed")
FAKES = flags.DEFINE_integer("fakes", 0, "planted fakes of each kind to measure the filter on")
TRUE_TASKS = flags.DEFINE_integer(
    "true_tasks", 5, "fakes: tasks of each of 4 families that are solved 6 times", lower_bound=1
)
INDEX = flags.DEFINE_string("index", "", "file: write the index of accepted generated tasks")
RUNS_OF = flags.DEFINE_list("runs_of", [], "folders of the runs that --index reads")
PRO_KEEP = 25  # of each of 8 domains


def main(argv: list[str]) -> int:
    reject_arguments(argv, "--families=all:4")
    if FUNNEL.value:
        return show_funnel(pathlib.Path(FUNNEL.value))
    if INDEX.value:
        return make_index()
    if not OUT.value:
        raise ValueError("--out is missing; it is the folder of the run, such as --out=runs/synth")
    if FILTER.value:
        return run_filter()
    if FAKES.value:
        return measure_fakes()
    if PRO.value:
        return run_pro()
    return run_synthesis()


def run_pro() -> int:
    """Make a whole set like `pro`; return 1 if a domain has too few tasks."""
    from envs.rock import SandboxConfig
    from rome.synth.rounds import make_balanced_set

    if FAMILIES.value or PACKAGES.value or REPOSITORIES.value or TOOLS.value:
        raise ValueError("--pro makes a set of all generators; give neither sources nor families")
    counts = asyncio.run(
        make_balanced_set(
            pathlib.Path(OUT.value),
            SandboxConfig(isolation=ISOLATION.value),
            seed=SEED.value,
            per_domain=KEEP.value or PRO_KEEP,
            mutants=MUTANTS.value,
            oracle_runs=ORACLE_RUNS.value,
            concurrency=CONCURRENCY.value,
            say=lambda text: print(text, flush=True),
        )
    )
    listed = ", ".join(f"{name} {number}" for name, number in counts.items())
    print(f"{sum(counts.values())} tasks in {pathlib.Path(OUT.value) / 'tasks'}: {listed}")
    return 0 if min(counts.values()) == (KEEP.value or PRO_KEEP) else 1


def run_synthesis() -> int:
    """Make a set; return 1 if no task was accepted."""
    from envs.rock import SandboxConfig
    from rome.synth.card import describe_card
    from rome.synth.pipeline import Settings, synthesise

    families, keep = FAMILIES.value, KEEP.value
    endpoints = read_endpoints()
    sources = (families, PACKAGES.value, REPOSITORIES.value, TOOLS.value, endpoints)
    if not any(sources):
        raise ValueError(
            "nothing to make tasks of: give --families, --packages, --repositories or --tools"
        )
    settings = Settings(
        families=families,
        packages=tuple(PACKAGES.value),
        repositories=tuple(REPOSITORIES.value),
        tools=tuple(TOOLS.value),
        count=COUNT.value,
        keep=keep,
        mutants=MUTANTS.value,
        oracle_runs=ORACLE_RUNS.value,
        attempts=ATTEMPTS.value,
        band=read_band(),
        licences=LICENCES.value,
        seed=SEED.value,
    )
    job = synthesise(
        settings,
        pathlib.Path(OUT.value),
        SandboxConfig(isolation=ISOLATION.value),
        concurrency=CONCURRENCY.value,
        endpoints=endpoints,
        say=lambda text: print(text, flush=True),
    )
    card = asyncio.run(job)
    print("\n".join(describe_card(card)))
    print(f"tasks: {pathlib.Path(OUT.value) / 'tasks'}")
    return 0 if card["accepted"] else 1


def read_band() -> tuple[float, float]:
    """Return the least and the most pass rate of --band."""
    try:
        least, most = map(float, BAND.value)
    except ValueError:
        raise ValueError(
            f"--band={','.join(BAND.value)} is not LEAST,MOST such as 0.1,0.9"
        ) from None
    if not 0 <= least <= most <= 1:
        raise ValueError(f"--band={least:g},{most:g} is not within 0 to 1, the least first")
    return least, most


def read_endpoints() -> Endpoints | None:
    """Return the model of the agents; None without --endpoint."""
    if not ENDPOINT.value:
        return None
    from rome.agent.endpoint import ChatEndpoint
    from rome.synth.models import Endpoints

    if not MODEL.value:
        raise ValueError("--endpoint needs --model, the name of the model there")
    key = os.environ.get(API_KEY_ENV.value) or None
    return Endpoints(ChatEndpoint(ENDPOINT.value, MODEL.value, key), api_key=key)


def make_index() -> int:
    """Write the index of accepted generated tasks; return 0."""
    from rome.synth.index import write_index

    if not RUNS_OF.value:
        raise ValueError("--index needs --runs_of, the folders of the runs that made the tasks")
    counts = write_index(
        [pathlib.Path(run) for run in RUNS_OF.value],
        pathlib.Path(INDEX.value),
        KEEP.value or PRO_KEEP,
    )
    listed = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
    print(f"{sum(counts.values())} tasks in {INDEX.value}: {listed}")
    return 0


def run_filter() -> int:
    """Filter trajectories; return 0."""
    from envs.rock import SandboxConfig
    from rome.synth.filter import filter_folder
    from rome.synth.funnel import describe_funnel

    if not TASKS.value:
        raise ValueError("--filter needs --tasks, the data set of the trajectories' tasks")
    endpoints = read_endpoints()
    funnel = asyncio.run(
        filter_folder(
            pathlib.Path(FILTER.value),
            TASKS.value,
            pathlib.Path(OUT.value),
            SandboxConfig(isolation=ISOLATION.value),
            runs=RUNS.value,
            concurrency=CONCURRENCY.value,
            chat=endpoints.chat if endpoints else None,
            labels=pathlib.Path(LABELS.value) if LABELS.value else None,
        )
    )
    print("\n".join(describe_funnel(funnel)))
    return 0


def show_funnel(folder: pathlib.Path) -> int:
    """Print and plot what each stage of a filter removed."""
    from rome.synth.funnel import describe_funnel, plot_funnel, read_funnel

    funnel = read_funnel(folder)
    plot_funnel(funnel, folder / "funnel.png")
    print("\n".join([*describe_funnel(funnel), f"plot: {folder / 'funnel.png'}"]))
    return 0


def measure_fakes() -> int:
    """Measure the filter on planted fakes; return 0."""
    from envs.rock import SandboxConfig
    from rome.synth.fakes import measure

    report = asyncio.run(
        measure(
            pathlib.Path(OUT.value),
            FAKES.value,
            SandboxConfig(isolation=ISOLATION.value),
            runs=RUNS.value,
            concurrency=CONCURRENCY.value,
            seed=SEED.value,
            tasks_per_family=TRUE_TASKS.value,
        )
    )
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run_command("launch.synth", main)
