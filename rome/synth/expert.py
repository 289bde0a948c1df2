"""The fourth stage: a person reads the doubtful trajectories and a sample of the others.

The queue is one HTML file that needs no server: it shows each trajectory, takes accept or reject
with a reason, and exports the decisions as JSONL, which the next run of the filter reads back.
"""

from __future__ import annotations

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rome.data.seeds import derive_seed
from rome.files import write_atomically
from rome.synth.verdicts import Item, Verdict

SAMPLE_SHARE = 0.05  # of the ones without doubt that a person reads
DOUBT = 0.75  # a judge's score below this is doubtful
MAX_SHOWN = 4000  # characters of a turn or an observation
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
    "article{border:1px solid #ccc;margin:1em 0;padding:1em}pre{background:#f6f6f6;padding:.6em;"
    "overflow:auto;white-space:pre-wrap}input[type=text]{width:60%}"
)
_SCRIPT = """\
document.getElementById('export').addEventListener('click', () => {
  const lines = [];
  for (const item of document.querySelectorAll('article')) {
    const chosen = item.querySelector('input[type=radio]:checked');
    if (!chosen) continue;
    const reason = item.querySelector('input[type=text]').value;
    const {id, digest} = item.dataset;
    lines.push(JSON.stringify({id, digest, decision: chosen.value, reason}));
  }
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([lines.join('\\n') + '\\n'], {type: 'text/plain'}));
  link.download = 'decisions.jsonl';
  link.click();
});
"""


class Decision(NamedTuple):
    """What a person decided on one trajectory.

    Attributes:
      accepted: whether it is kept.
      reason: of the person; may be empty.
      digest: of what was read; "" where the file does not say it, which stands for any content.
    """

    accepted: bool
    reason: str = ""
    digest: str = ""


def choose_queue(items: Sequence[Item]) -> list[Item]:
    """Return what a person should read: doubtful items, and a seeded sample of the others."""
    queue = []
    for item in items:
        if item.rejected_by in ("heuristic", "judge", "execution"):
            continue
        judged = item.verdicts.get("judge")
        executed = item.verdicts.get("execution")
        is_doubtful = (judged is not None and judged.score < DOUBT) or (
            executed is not None and executed.accepted is None
        )
        is_sampled = derive_seed("expert", item.id) / 2**31 < SAMPLE_SHARE
        if is_doubtful or is_sampled:
            queue.append(item)
    return queue


def decision_on(item: Item, decisions: Mapping[str, Decision]) -> Decision | None:
    """Return the decision on an item; None for none, or for one on what the file held before."""
    found = decisions.get(item.id)
    return found if found is not None and found.digest in ("", item.digest) else None


def expert_verdict(item: Item, queue: Sequence[Item], decisions: Mapping[str, Decision]) -> Verdict:
    """Return what the expert says: None as opinion where the item is not read, or not yet."""
    if found := decision_on(item, decisions):
        reasons = (found.reason,) if found.reason else ()
        return Verdict("expert", found.accepted, float(found.accepted), reasons)
    reason = "waits for a decision" if any(item is one for one in queue) else ""
    return Verdict("expert", None, 0.5 if reason else 1.0, (reason,) if reason else ())


def write_queue(path: pathlib.Path, queue: Sequence[Item]) -> None:
    """Write the page of the queue. Transcripts may be hostile: all of them is escaped."""
    parts = [_article(number, item) for number, item in enumerate(queue)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta'
        ' http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src'
        " 'unsafe-inline'; script-src 'unsafe-inline'\"><title>Review queue</title>"
        f"<style>{_STYLE}</style></head><body><h1>{len(queue)} trajectories to read</h1>"
        '<p><button id="export">Export the decisions</button> Put decisions.jsonl beside this file'
        " and run the filter again.</p>"
        + "\n".join(parts)
        + f"<script>{_SCRIPT}</script></body></html>\n"
    )
    write_atomically(path, page.encode(errors="replace"))


def _article(number: int, item: Item) -> str:
    reasons = [reason for verdict in item.verdicts.values() for reason in verdict.reasons]
    turns = []
    for chunk in item.trajectory.chunks:
        turns.append(f"<pre>{_text(chunk.text)}</pre><pre>{_text(chunk.observation)}</pre>")
    choices = "".join(
        f'<label><input type="radio" name="d{number}" value="{value}"> {value}</label> '
        for value in ("accept", "reject")
    )
    return (
        f'<article data-id="{html.escape(item.id, quote=True)}" data-digest="{item.digest}">'
        f"<h2>{_text(item.trajectory.task)}</h2><p>{_text('; '.join(reasons))}</p>"
        f"<details><summary>The task</summary><pre>{_text(item.instruction)}</pre></details>"
        f"{''.join(turns)}<p>{choices}"
        f'<input type="text" placeholder="reason"></p></article>'
    )


def _text(text: str) -> str:
    return html.escape(text[:MAX_SHOWN])


def read_decisions(path: pathlib.Path) -> dict[str, tuple[bool, str]]:
    """Return {id: (accepted, reason)} of an exported file, whatever content was read.

    Raises:
      ValueError: a line is no decision; the message names it.
    """
    return {name: (one.accepted, one.reason) for name, one in read_reviews(path).items()}


def read_reviews(path: pathlib.Path) -> dict[str, Decision]:
    """Return the decision on each id of an exported file; the last one on an id counts.

    Raises:
      ValueError: a line is no decision; the message names it.
    """
    found: dict[str, Decision] = {}
    if not path.exists():
        return found
    # Only "\n" ends a line of JSONL: a reason may hold what str.splitlines takes for another end.
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
            accepted = {"accept": True, "reject": False}[record["decision"]]
            reason, digest = str(record.get("reason", "")), str(record.get("digest", ""))
            found[str(record["id"])] = Decision(accepted, reason, digest)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: not a decision ({type(error).__name__}: {error}); a line is"
                ' {"id": ..., "decision": "accept" or "reject", "reason": ...}'
            ) from error
    return found
