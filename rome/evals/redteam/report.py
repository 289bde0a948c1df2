"""What a search found: OUT/report.json, OUT/report.md and OUT/seeds.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from envs.safety.found import save_injections
from rome.evals.redteam.search import Search
from rome.files import write_atomically
from rome.train.intervals import wilson


def summarise(search: Search, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the report as JSON values."""
    found = []
    for one in search.found:
        row = {"name": one.injection.name, **dataclasses.asdict(one.injection)}
        row |= {"first_words": one.first.words, "mutation": one.mutation}
        row |= {"successes": one.successes, "plays": one.plays, "utility": one.utility}
        if one.plays:
            row["low"], row["high"] = wilson(one.successes, one.plays)
        found.append(row)
    return {
        **identity,
        "plays": search.plays,
        "found": found,
        "duplicates": search.duplicates,
        "unconfirmed": search.unconfirmed,
        "refused": search.refused,
        "refused_rewrites": search.refused_rewrites,
        **{f"by_{kind}": counts for kind, counts in search.counts.items()},
    }


def write_report(out: pathlib.Path, summary: dict[str, Any], search: Search) -> None:
    """Write the report, and the seeds where there are any."""
    write_atomically(out / "report.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(out / "report.md", "\n".join(_lines(summary)) + "\n")
    if search.found:
        save_injections(out / "seeds.json", [one.injection for one in search.found])


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"# Red team against {summary['agent']}",
        "",
        f"{summary['plays']} plays; {len(summary['found'])} injections kept,"
        f" {summary['duplicates']} duplicates, {summary['unconfirmed']} not confirmed,"
        f" {len(summary['refused'])} that no base task carries.",
        "",
        "Rates are on numbers that the search did not choose by.",
        "",
        "| carrier | goal | words | succeeds | 95 % interval | utility |",
        "|---|---|---|---|---|---|",
    ]
    for one in summary["found"]:
        words = one["words"].replace("|", "\\|")
        rate = f"{one['successes']} of {one['plays']}" if one["plays"] else "not measured"
        bound = f"{one['low']:.2f} to {one['high']:.2f}" if one["plays"] else ""
        lines.append(
            f"| {one['carrier']} | {one['goal']} | {words} | {rate} | {bound} |"
            f" {one['utility']:.2f} |"
        )
    for kind in ("carrier", "goal", "mutation"):
        lines += ["", f"| {kind} | succeeded | proposals |", "|---|---|---|"]
        lines += [f"| {name} | {k} | {n} |" for name, (k, n) in summary[f"by_{kind}"].items()]
    return lines
