"""What an evaluation leaves: results.json for programs, report.md and report.html for people.

Names, notes and instructions come from task folders, agents and servers: hostile text. Both pages
escape all of it, and the HTML page loads nothing and runs nothing, by its own policy too.
"""

from __future__ import annotations

import collections
import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rome.evals.statistics import counted, grouped, summarise
from rome.train.metrics import write_atomically

SHOWN_ATTEMPTS = 2000  # in the pages; results.json has all
ABOUT = ("dataset", "agent", "seed", "isolation", "model", "checkpoint", "endpoint", "complete")
NAMES = {
    "mean_reward": "mean reward",
    "pass_at_1": "pass@1",
    "pass_at_k": "pass@{k}",
    "avg_at_k": "avg@{k}",
}
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0"
    " 1em;color:#222}table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em"
    " .8em;border-bottom:1px solid"
    " #ddd;text-align:left;vertical-align:top;overflow-wrap:anywhere}th{background:#f5f5f5}"
)
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def build_results(
    identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]], k: int
) -> dict[str, Any]:
    """results.json: what was evaluated, every attempt, the figures of `summarise`, and the same by
    domain, difficulty and ending.
    """
    tokens = [record["tokens"] for record in records if record.get("tokens")]
    seconds = sorted(record["seconds"] for record in records)
    return {
        **identity,
        **summarise(records, k),
        "by_domain": grouped(records, "domain"),
        "by_difficulty": grouped(records, "difficulty"),
        "by_ending": dict(
            sorted(collections.Counter(record["ending"] for record in records).items())
        ),
        "cost": {
            "tokens": (
                {name: sum(one[name] for one in tokens) for name in ("prompt", "completion")}
                if tokens
                else None
            ),
            "seconds_of_attempts": round(sum(seconds), 3),
            "seconds_median": seconds[len(seconds) // 2] if seconds else None,
            "seconds_longest": seconds[-1] if seconds else None,
        },
        "tasks": list(records),
    }


def write_results(out: pathlib.Path, results: Mapping[str, Any]) -> None:
    """OUT/results.json, report.md and report.html, each whole or not at all."""
    write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_pages(
        out, "report", f"{results['agent']} on {results['dataset']}", result_tables(results)
    )


def write_pages(out: pathlib.Path, name: str, title: str, tables: Sequence[Table]) -> None:
    write_atomically(out / f"{name}.md", markdown(title, tables))
    write_atomically(out / f"{name}.html", page(title, tables))


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    k = results["k"]
    about = [[name, str(results[name])] for name in ABOUT if results.get(name) is not None]
    tried, whole, spoiled = (
        results["tasks_counted"],
        results["tasks_with_k_attempts"],
        results["attempts"] - results["attempts_counted"],
    )
    about += [
        [
            "tasks",
            (
                f"{results['tasks_total']}, {tried} of them with an attempt that counts, {whole}"
                f" with all {k}"
            ),
        ],
        [
            "attempts",
            (
                f"{results['attempts']}, of which {spoiled} spoiled by the infrastructure and in no"
                " figure"
            ),
        ],
    ]
    intervals = results["intervals"]
    figures = [
        [
            label.format(k=k),
            share(results[name]),
            bounds(intervals[name]),
            (intervals[name] or {}).get("method", ""),
        ]
        for name, label in NAMES.items()
        if k > 1 or not name.endswith("_at_k")
    ]
    figures += [
        [f"pass@{size}", share(value), "", ""]
        for size, value in results["pass_at"].items()
        if int(size) not in (1, k)
    ]
    head = ["", "tasks", "attempts", "mean reward", "pass@1", "95 % interval"]
    groups = [
        (
            f"By {key}",
            [key, *head[1:]],
            [
                [
                    name,
                    str(one["tasks"]),
                    str(one["attempts"]),
                    share(one["mean_reward"]),
                    share(one["pass_at_1"]),
                    bounds(one["interval"]),
                ]
                for name, one in results[f"by_{key}"].items()
            ],
        )
        for key in ("domain", "difficulty")
    ]
    cost, tokens = results["cost"], results["cost"]["tokens"]
    spent = [
        ["seconds of all attempts", f"{cost['seconds_of_attempts']:.1f}"],
        [
            "seconds of one: median, longest",
            f"{cost['seconds_median'] or 0:.2f}, {cost['seconds_longest'] or 0:.2f}",
        ],
    ]
    spent += (
        [[f"{name} tokens", f"{tokens[name]:,}"] for name in ("prompt", "completion")]
        if tokens
        else []
    )
    attempts = sorted(
        results["tasks"],
        key=lambda record: (
            counted(record) and record["reward"] == 1.0,
            record["task"],
            record["attempt"],
        ),
    )
    rows = [
        [
            record["task"],
            str(record["attempt"]),
            "" if record["reward"] is None else f"{record['reward']:g}",
            record["ending"],
            f"{record['seconds']:.2f}",
            record.get("note", ""),
        ]
        for record in attempts[:SHOWN_ATTEMPTS]
    ]
    left = (
        f" (the first {SHOWN_ATTEMPTS} of {len(attempts)})"
        if len(attempts) > SHOWN_ATTEMPTS
        else ""
    )
    return [
        ("What was evaluated", ["", ""], about),
        ("Figures", ["figure", "value", "95 % interval", "method"], figures),
        *groups,
        (
            "Endings",
            ["ending", "attempts"],
            [[name, str(count)] for name, count in results["by_ending"].items()],
        ),
        ("Cost", ["", ""], spent),
        (
            f"Attempts, those that did not succeed first{left}",
            ["task", "attempt", "reward", "ending", "seconds", "note"],
            rows,
        ),
    ]


def share(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def bounds(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['low']:.3f} to {one['high']:.3f}"


# -- pages
# -------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """One line without control characters, directional marks and lone surrogates: what is left can
    be shown and encoded.
    """
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]",
        " ",
        text,
    )


def markdown(title: str, tables: Sequence[Table]) -> str:
    """Tables of GitHub's Markdown.

    What has a meaning in it, or in HTML, is escaped; so are addresses, mentions and issue numbers.
    """

    def cell(text: str) -> str:
        escaped = re.sub(
            r"[\\*\[\]~$]|(?<!\w)_|_(?!\w)|@(?=[A-Za-z])|#(?=\w)|:(?=//)|(?<=www)\.",
            r"\\\g<0>",
            plain(text),
        )
        return re.sub(r"[<>&|`]", lambda match: f"&#{ord(match[0])};", escaped)

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(cell, cells))} |"

    parts = [f"# {cell(title)}"]
    for heading, head, rows in tables:
        parts.append(
            f"## {cell(heading)}\n\n"
            + (
                "\n".join([row(head), "|" + " --- |" * len(head), *map(row, rows)])
                if rows
                else "None."
            )
        )
    return "\n\n".join(parts) + "\n"


def page(title: str, tables: Sequence[Table]) -> str:
    """One HTML file that needs no other. A table without heads has none."""

    def row(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}>{html.escape(plain(cell))}</{tag}>" for cell in cells)
            + "</tr>"
        )

    body = [f"<h1>{html.escape(plain(title))}</h1>"]
    for heading, head, rows in tables:
        body.append(f"<h2>{html.escape(plain(heading))}</h2>")
        body.append(
            "<table>"
            + (row(head, "th") if any(head) else "")
            + "".join(row(one, "td") for one in rows)
            + "</table>"
            if rows
            else "<p>None.</p>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'\">"
        f"<title>{html.escape(plain(title))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
