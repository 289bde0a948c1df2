"""Writes the results of an evaluation: results.json for programs, pages for people.

Names, notes and instructions come from task folders, agents and servers, and may be hostile. Both
pages (report.md, report.html) escape all of it; the HTML page loads nothing and runs nothing, which
its own security policy enforces.
"""

from __future__ import annotations

import collections
import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from envs.tasks.harbor import TaskError
from rome.evals.statistics import Record, grouped, is_solved, summarise
from rome.files import write_atomically

MAX_SHOWN_ATTEMPTS = 2000  # in the pages; results.json has all
ABOUT = ("dataset", "agent", "seed", "isolation", "model", "checkpoint", "endpoint", "complete")
NAMES = {
    "mean_reward": "mean reward",
    "pass_at_1": "pass@1",
    "pass_at_k": "pass@{k}",
    "avg_at_k": "avg@{k}",
}
TOKEN_KINDS = ("prompt", "completion")
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0"
    " 1em;color:#222}table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em"
    " .8em;border-bottom:1px solid"
    " #ddd;text-align:left;vertical-align:top;overflow-wrap:anywhere}th{background:#f5f5f5}"
)
# Characters that cannot be shown or encoded: control characters, directional marks, surrogates.
_NOT_PLAIN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    r"\ufffe\uffff]"
)
# Characters with a meaning in Markdown: markup, mentions, issue numbers, addresses.
_MARKDOWN = re.compile(r"[\\*\[\]~$]|(?<!\w)_|_(?!\w)|@(?=[A-Za-z])|#(?=\w)|:(?=//)|(?<=www)\.")


class Table(NamedTuple):
    """A table of a page.

    Attributes:
      title: its heading.
      head: names of the columns; a table whose names are all empty has no head.
      rows: its cells.
    """

    title: str
    head: list[str]
    rows: list[list[str]]


# -- results.json
# -------------------------------------------------------------------------------------------------


def build_results(
    identity: Mapping[str, Any],
    records: Sequence[Record],
    k: int,
    faults: Sequence[TaskError] = (),
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
      identity: what was evaluated; its fields come first.
      records: of all attempts.
      k: attempts at each task.
      faults: of tasks that could not be read.

    Returns:
      `identity`, the metrics of `summarise`, `counted` (the number of tasks that they rest on),
      `left_out` ([{task, reason}]: tasks that could not be read, or not be played here), the
      metrics by source (of mixtures), family, domain and difficulty, endings, approximated
      settings, cost, and every attempt.
    """
    endings = collections.Counter(record["ending"] for record in records)
    summary = summarise(records, k)
    return {
        **identity,
        **summary,
        "counted": summary["tasks_counted"],
        "left_out": _left_out(records, faults),
        "approximated": _approximated(records),
        "by_source": grouped([one for one in records if one.get("source")], "source"),
        "by_family": grouped([one for one in records if "family" in one], "family"),
        "by_domain": grouped(records, "domain"),
        "by_difficulty": grouped(records, "difficulty"),
        "by_ending": dict(sorted(endings.items())),
        "cost": _sum_cost(records),
        "tasks": list(records),
    }


def _left_out(records: Sequence[Record], faults: Sequence[TaskError]) -> list[dict[str, str]]:
    """Return the tasks that say nothing about the agent, whatever is tried, and why."""
    left_out = []
    for fault in faults:
        place = f"{fault.file}:{fault.line}" if fault.line else str(fault.file)
        left_out.append({"task": place, "reason": fault.message})
    attempts: dict[str, list[Record]] = {}
    for record in records:
        attempts.setdefault(record["task"], []).append(record)
    for task, tried in attempts.items():
        if all(record.get("permanent") for record in tried):
            left_out.append({"task": task, "reason": tried[0]["note"] or tried[0]["ending"]})
    return left_out


def _approximated(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return each setting of tasks that was not honoured as it stands, and the tasks' names."""
    tasks: dict[str, list[str]] = {}
    for record in records:
        for note in record.get("notes", ()):
            names = tasks.setdefault(note, [])
            if record["task"] not in names:
                names.append(record["task"])
    return [{"note": note, "tasks": names} for note, names in sorted(tasks.items())]


def _sum_cost(records: Sequence[Record]) -> dict[str, Any]:
    """Return tokens (None where no model played) and seconds of all attempts."""
    used = [record["tokens"] for record in records if record.get("tokens")]
    tokens = None
    if used:
        tokens = {kind: sum(one[kind] for one in used) for kind in TOKEN_KINDS}
    seconds = sorted(record["seconds"] for record in records)
    return {
        "tokens": tokens,
        "seconds_of_attempts": round(sum(seconds), 3),
        "seconds_median": seconds[len(seconds) // 2] if seconds else None,
        "seconds_longest": seconds[-1] if seconds else None,
    }


def write_results(
    out: pathlib.Path, results: Mapping[str, Any], more: Sequence[Table] = ()
) -> None:
    """Write OUT/results.json, report.md and report.html, each atomically.

    Args:
      out: the folder.
      results: the content of results.json.
      more: tables that follow the metrics in the pages.
    """
    write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    title = f"{results['agent']} on {results['dataset']}"
    about, metrics, *rest = result_tables(results)
    write_pages(out, "report", title, [about, metrics, *more, *rest])


def write_pages(out: pathlib.Path, name: str, title: str, tables: Sequence[Table]) -> None:
    """Write OUT/NAME.md and OUT/NAME.html."""
    write_atomically(out / f"{name}.md", markdown(title, tables))
    write_atomically(out / f"{name}.html", page(title, tables))


# -- tables of a report
# -------------------------------------------------------------------------------------------------


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a report, from the content of results.json."""
    endings = [[name, str(count)] for name, count in results["by_ending"].items()]
    left_out = [[one["task"], one["reason"]] for one in results["left_out"]]
    approximated = []
    for one in results["approximated"]:
        shown = ", ".join(one["tasks"][:3]) + (", ..." if len(one["tasks"]) > 3 else "")
        approximated.append([one["note"], str(len(one["tasks"])), shown])
    return [
        _about_table(results),
        _metrics_table(results),
        *([_group_table(results, "source")] if results["by_source"] else []),
        _group_table(results, "domain"),
        _group_table(results, "family"),
        _group_table(results, "difficulty"),
        Table("Endings", ["ending", "attempts"], endings),
        Table(f"Left out: {len(left_out)} tasks", ["task", "reason"], left_out),
        Table("Settings that were not honoured", ["setting", "tasks", "such as"], approximated),
        _cost_table(results["cost"]),
        _attempts_table(results["tasks"]),
    ]


def _about_table(results: Mapping[str, Any]) -> Table:
    rows = [[name, str(results[name])] for name in ABOUT if results.get(name) is not None]
    tasks = (
        f"{results['tasks_total']}, {results['tasks_counted']} of them with an attempt that counts,"
        f" {results['tasks_with_k_attempts']} with all {results['k']}"
    )
    num_spoiled = results["attempts"] - results["attempts_counted"]
    attempts = (
        f"{results['attempts']}, of which {num_spoiled} spoiled by the infrastructure and in no"
        " metric"
    )
    rows += [["tasks", tasks], ["attempts", attempts]]
    return Table("What was evaluated", ["", ""], rows)


def _metrics_table(results: Mapping[str, Any]) -> Table:
    k = results["k"]
    rows = []
    for name, label in NAMES.items():
        if k == 1 and name.endswith("_at_k"):  # the same as pass@1 and the mean reward
            continue
        uncertainty = results["intervals"][name]
        method = uncertainty["method"] if uncertainty else ""
        rows.append([label.format(k=k), share(results[name]), bounds(uncertainty), method])
    for size, value in results["pass_at"].items():
        if int(size) not in (1, k):
            rows.append([f"pass@{size}", share(value), "", ""])
    return Table("Metrics", ["metric", "value", "95 % interval", "method"], rows)


def _group_table(results: Mapping[str, Any], key: str) -> Table:
    head = [key, "tasks", "attempts", "mean reward", "pass@1", "95 % interval"]
    rows = []
    for name, group in results[f"by_{key}"].items():
        row = [name, str(group["tasks"]), str(group["attempts"])]
        row += [share(group["mean_reward"]), share(group["pass_at_1"]), bounds(group["interval"])]
        rows.append(row)
    return Table(f"By {key}", head, rows)


def _cost_table(cost: Mapping[str, Any]) -> Table:
    median = cost["seconds_median"] or 0
    longest = cost["seconds_longest"] or 0
    rows = [
        ["seconds of all attempts", f"{cost['seconds_of_attempts']:.1f}"],
        ["seconds of one: median, longest", f"{median:.2f}, {longest:.2f}"],
    ]
    if cost["tokens"]:
        for kind in TOKEN_KINDS:
            rows.append([f"{kind} tokens", f"{cost['tokens'][kind]:,}"])
    return Table("Cost", ["", ""], rows)


def _attempts_table(records: Sequence[Record]) -> Table:
    """Return the attempts, those that did not succeed first."""
    attempts = sorted(records, key=_display_order)
    title = "Attempts, those that did not succeed first"
    if len(attempts) > MAX_SHOWN_ATTEMPTS:
        title += f" (the first {MAX_SHOWN_ATTEMPTS} of {len(attempts)})"
    rows = []
    for record in attempts[:MAX_SHOWN_ATTEMPTS]:
        reward = "" if record["reward"] is None else f"{record['reward']:g}"
        row = [record["task"], str(record["attempt"]), reward, record["ending"]]
        row += [f"{record['seconds']:.2f}", record.get("note", "")]
        rows.append(row)
    return Table(title, ["task", "attempt", "reward", "ending", "seconds", "note"], rows)


def _display_order(record: Record) -> tuple[bool, str, int]:
    return is_solved(record), record["task"], record["attempt"]


def share(value: float | None) -> str:
    """Return a value from 0 to 1 as text; "none" for None."""
    return "none" if value is None else f"{value:.3f}"


def bounds(interval: Mapping[str, Any] | None) -> str:
    """Return an interval as text; "" for None."""
    return "" if interval is None else f"{interval['low']:.3f} to {interval['high']:.3f}"


# -- pages
# -------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return the text on one line, without characters that cannot be shown or encoded."""
    return _NOT_PLAIN.sub(" ", text)


def markdown(title: str, tables: Sequence[Table]) -> str:
    """Return a page of tables in GitHub's Markdown; everything with a meaning in it is escaped."""
    parts = [f"# {_markdown_cell(title)}"]
    for table in tables:
        parts.append(f"## {_markdown_cell(table.title)}")
        if not table.rows:
            parts.append("None.")
            continue
        lines = [_markdown_row(table.head), "|" + " --- |" * len(table.head)]
        lines += [_markdown_row(row) for row in table.rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(text: str) -> str:
    escaped = _MARKDOWN.sub(r"\\\g<0>", plain(text))
    return re.sub(r"[<>&|`]", lambda match: f"&#{ord(match[0])};", escaped)


def page(title: str, tables: Sequence[Table]) -> str:
    """Return the same page as one HTML file that needs no other."""
    body = [f"<h1>{_html_text(title)}</h1>"]
    for table in tables:
        body.append(f"<h2>{_html_text(table.title)}</h2>")
        if not table.rows:
            body.append("<p>None.</p>")
            continue
        rows = [_html_row(row, "td") for row in table.rows]
        if any(table.head):
            rows.insert(0, _html_row(table.head, "th"))
        body.append(f"<table>{''.join(rows)}</table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'\">"
        f"<title>{_html_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{_html_text(cell)}</{tag}>" for cell in cells) + "</tr>"


def _html_text(text: str) -> str:
    return html.escape(plain(text))
