"""The data card of a set: what each stage let through, what it cost, and what is in the set."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rome.evals.statistics import interval

# Stages at which a draft can leave, in order; "accepted" where there are enough of its domain.
GATES = ("verifier", "unique", "mutants", "proof", "band", "accepted")
MAX_REASONS = 5  # shown of each stage


def make_card(
    settings: Any,
    seeds: int,
    units: Sequence[Any],
    aside: Sequence[Any],
    trace: Any,
    specs: Mapping[str, Any],
    wall_seconds: float,
) -> dict[str, Any]:
    """Return the content of card.json.

    Args:
      settings: of the run.
      seeds: number of them.
      units: drafts, with the stage at which each left.
      aside: inputs that were not used.
      trace: of the agents' work.
      specs: of the agents.
      wall_seconds: of this call; a resumed run's earlier calls are not in it.
    """
    accepted = [unit for unit in units if not unit.left]
    rest = len(units)
    stages = {"seeds": seeds, "built": rest}
    for gate in GATES:
        rest -= sum(unit.left == gate for unit in units)
        stages[gate] = rest
    agents = ("explore", "builder", "review", "proof", "trajectory")
    seconds = {name: round(trace.seconds(name), 1) for name in agents}
    tokens = {name: trace.tokens(name) for name in agents}
    total = sum(seconds.values())
    number = len(accepted)
    mutants = _mutation_score(accepted)
    return {
        "settings": dataclasses.asdict(settings),
        "yield_by_stage": stages,
        "accepted": number,
        "mutation_score": mutants["score"] if mutants else None,
        "mutants": mutants,
        "mutants_of_all_drafts": _mutation_score([unit for unit in units if unit.mutants]),
        "cost_seconds_per_accepted": round(total / number, 2) if number else None,
        "cost_tokens_per_accepted": round(sum(tokens.values()) / number, 1) if number else None,
        "seconds_by_agent": seconds,
        "tokens_by_agent": tokens,
        "agents": {name: spec.to_json() for name, spec in specs.items()},
        "duplicates": sum(unit.left == "unique" for unit in units),
        "domains": _counts(unit.draft.domain for unit in accepted),
        "families": _counts(unit.draft.family for unit in accepted),
        "languages": _counts(unit.draft.language for unit in accepted),
        "reasons": _reasons(units),
        "set_aside": len(aside),
        "wall_seconds": round(wall_seconds, 1),
        "tasks": [
            {
                "name": unit.draft.name,
                "digest": unit.draft.digest,
                "domain": unit.draft.domain,
                "mutation_score": round(unit.mutants.score, 3),
                "mutants": unit.mutants.tried,
                "pass_rate": unit.pass_rate,
            }
            for unit in accepted
        ],
    }


def _mutation_score(units: Sequence[Any]) -> dict[str, Any] | None:
    """Return the share of mutants that verifiers reject, over tasks, with its 95 % interval."""
    scored = [unit.mutants for unit in units if unit.mutants and unit.mutants.tried]
    if not scored:
        return None
    tried = sum(one.tried for one in scored)
    rejected = sum(one.rejected for one in scored)
    bounds = interval([one.score for one in scored])
    return {
        "rejected": rejected,
        "tried": tried,
        "score": round(rejected / tried, 4),
        "least": round(min(one.score for one in scored), 3),
        "low": round(bounds["low"], 4),
        "high": round(bounds["high"], 4),
    }


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(collections.Counter(values).items()))


def _reasons(units: Sequence[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for unit in units:
        if unit.left and unit.left != "accepted":
            found.setdefault(unit.left, []).append(f"{unit.draft.name}: {unit.reason}")
    return {stage: reasons[:MAX_REASONS] for stage, reasons in found.items()}


def describe_card(card: Mapping[str, Any]) -> list[str]:
    """Return the card as lines for a terminal."""
    stages = ", ".join(f"{name} {number}" for name, number in card["yield_by_stage"].items())
    lines = [f"yield by stage: {stages}; {card['set_aside']} inputs set aside"]
    if card["mutants"]:
        score = card["mutants"]
        lines.append(
            f"mutation score of the set {score['score']:.3f} ({score['rejected']} of"
            f" {score['tried']}), least {score['least']:.2f}"
        )
    domains = ", ".join(f"{name} {number}" for name, number in card["domains"].items())
    lines.append(
        f"{card['accepted']} tasks accepted: {domains or 'none'};"
        f" {card['cost_seconds_per_accepted']} s each, {card['duplicates']} duplicates"
    )
    return lines
