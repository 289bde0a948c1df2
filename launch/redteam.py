r"""Searches for injections that succeed against a given agent, and keeps them as seeds.

python -m launch.redteam --dataset terminal --agent policy --checkpoint runs/X/final \
    --budget 400 --out OUT
python -m launch.redteam --dataset terminal --agent endpoint --endpoint URL --model NAME \
    --attacker_endpoint URL --attacker_model NAME --budget 400 --out OUT
python -m launch.eval --dataset safety:OUT/seeds.json --agent policy --checkpoint DIR --out OUT2
python -m launch.eval --dataset safety:OUT/seeds.json:40 --validate --out OUT3

--dataset names the base tasks that carry the injections. Writes OUT/seeds.json, report.json and
report.md; every play is in OUT/results.jsonl. After a kill the same command goes on; so does a
larger --budget. See docs/safety.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import _eval_flags as given
from launch._main import reject_arguments, run_command, use_compilation_cache
from launch.eval import known_errors, open_agent, stop_message, until_sigterm

if TYPE_CHECKING:
    from rome.evals.agents import Agent

flags.adopt_module_key_flags(given)

BUDGET = flags.DEFINE_integer("budget", 200, "Plays in all, of every kind.", lower_bound=8)
CARRIERS = flags.DEFINE_list("carriers", [], "Ways to the agent. Default: all that carry text.")
GOALS = flags.DEFINE_list("goals", [], "What is demanded. Default: all goals of the suite.")
ATTACKER_ENDPOINT = flags.DEFINE_string(
    "attacker_endpoint", "", "URL of an OpenAI-compatible server whose model rewrites injections."
)
ATTACKER_MODEL = flags.DEFINE_string("attacker_model", "", "Name of the attacker's model.")
ATTACKER_KEY_ENV = flags.DEFINE_string(
    "attacker_key_env", "", "The environment variable that holds the attacker endpoint's key."
)


def main(argv: list[str]) -> int:
    reject_arguments(argv, "--dataset=terminal")
    given.check_flags()
    check_own_flags()
    return asyncio.run(until_sigterm(search()))["status"]


def check_own_flags() -> None:
    """Raise ValueError for names that are unknown, and for half an attacker."""
    from envs.safety.found import TEXT_CARRIERS
    from envs.safety.goals import GOALS as ALL_GOALS

    _refuse_unknown("carriers", CARRIERS.value, TEXT_CARRIERS)
    _refuse_unknown("goals", GOALS.value, tuple(ALL_GOALS))
    if bool(ATTACKER_ENDPOINT.value) != bool(ATTACKER_MODEL.value):
        raise ValueError("an attacker needs both --attacker_endpoint URL and --attacker_model NAME")
    if given.VALIDATE.value or given.DECONTAMINATE.value or given.ATTEMPTS.value:
        raise ValueError("--validate, --decontaminate and --attempts are flags of launch.eval")


def _refuse_unknown(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--{flag} has no {unknown[0]!r}; known: {', '.join(known)}")


async def search() -> dict[str, Any]:
    """Search, and report also what a stop cuts short."""
    out = pathlib.Path(given.OUT.value)
    identity = {
        "base": given.DATASET.value,
        "agent": given.playing_agent(),
        "seed": given.SEED.value,
        "carriers": list(CARRIERS.value),
        "goals": list(GOALS.value),
        "attacker": ATTACKER_MODEL.value,
        **given.sandbox_settings(),
        **given.agent_settings(),
    }
    out.mkdir(parents=True, exist_ok=True)
    with open_agent(out) as agent:
        try:
            return await _search_with(agent, out, identity)
        finally:
            await agent.close()


async def _search_with(agent: Agent, out: pathlib.Path, identity: dict[str, Any]) -> dict[str, Any]:
    from envs.safety.found import TEXT_CARRIERS
    from envs.safety.goals import GOALS as ALL_GOALS
    from envs.sources import open_source
    from rome.agent.endpoint import ChatEndpoint
    from rome.evals.redteam.report import summarise, write_report
    from rome.evals.redteam.search import Search
    from rome.evals.redteam.writer import EndpointWriter
    from rome.evals.runner import open_results

    async with contextlib.AsyncExitStack() as stack:
        results = stack.enter_context(open_results(out, identity))
        writer = None
        if ATTACKER_ENDPOINT.value:
            key = os.environ.get(ATTACKER_KEY_ENV.value) or None
            attacker = ChatEndpoint(ATTACKER_ENDPOINT.value, ATTACKER_MODEL.value, key)
            stack.push_async_callback(attacker.close)
            writer = EndpointWriter(attacker, out / "rewrites.jsonl")
        work = Search(
            agent,
            results,
            open_source(given.DATASET.value, seed=given.SEED.value, settings=given.play_settings()),
            carriers=CARRIERS.value or TEXT_CARRIERS,
            goals=GOALS.value or tuple(ALL_GOALS),
            budget=BUDGET.value,
            seed=given.SEED.value,
            concurrency=given.CONCURRENCY.value,
            writer=writer,
        )
        try:
            await work.run()
        finally:
            summary = summarise(work, identity)
            write_report(out, summary, work)
    print(f"{work.plays} plays, {len(work.found)} injections kept\nreport: {out / 'report.md'}")
    return {"status": 0, **summary}


if __name__ == "__main__":
    use_compilation_cache()  # of the embedded engine
    run_command(
        "launch.redteam",
        main,
        known_errors=known_errors,
        failure_status=2,
        when_stopped=stop_message,
    )
