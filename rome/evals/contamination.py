"""Whether tasks stand in a text corpus: shared runs of 13 words, and canary strings.

Words are runs of letters and digits, compatibility-normalised (NFKC) and case-folded, so that
markup, punctuation and line breaks hide nothing. An instruction of fewer than 13 words is looked
for as a whole, down to 8; a shorter one says too little and is reported as not checked. A canary is
the GUID of a line that has the word "canary"; the loader hides it from the agent, so it is read
from the task's files.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envs.tasks.harbor import HarborTask
from rome.evals.report import Table, write_pages
from rome.evals.tasks import EvalTask
from rome.train.metrics import write_atomically

N = 13
FEWEST_WORDS = 8
CHUNK_BYTES = 1 << 20
LONGEST_WORD = 1 << 12  # of what a chunk's end may cut; more without a space is no text
MAX_CANARY_FILE = 1 << 20
KEPT_PLACES = 5  # of each hit
_WORD = re.compile(r"[^\W_]+")
_GUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")


def words_of(text: str) -> list[str]:
    return _WORD.findall(normalised(text))


def normalised(text: str) -> str:
    """Has the line breaks that the text has."""
    return unicodedata.normalize("NFKC", text).casefold()


def ngrams_of(text: str) -> set[tuple[str, ...]]:
    """The runs of 13 words; the whole where it has 8 to 12; nothing where it has fewer."""
    words = words_of(text)
    size = min(N, len(words))
    return (
        {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
        if size >= FEWEST_WORDS
        else set()
    )


def texts_of(task: EvalTask) -> list[str]:
    """The instructions of the task's steps: no run of words crosses from one to the next."""
    return (
        [step.instruction for step in task.source.steps]
        if isinstance(task.source, HarborTask)
        else [task.instruction]
    )


def canaries_of(task: EvalTask) -> set[str]:
    """Lower-case GUIDs of the lines of the task's files that speak of a canary."""
    if not isinstance(task.source, HarborTask):
        return set()
    found = set()
    for path in sorted(task.source.path.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_CANARY_FILE:
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if "canary" in line.lower():
                found |= set(_GUID.findall(line.lower()))
    return found


@dataclasses.dataclass
class _Hits:
    ngrams: set[tuple[str, ...]] = dataclasses.field(default_factory=set)
    canaries: set[str] = dataclasses.field(default_factory=set)
    places: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, place: dict[str, Any]) -> None:
        if len(self.places) < KEPT_PLACES:
            self.places.append(place)


def find_contamination(tasks: Sequence[EvalTask], corpus: pathlib.Path) -> dict[str, Any]:
    """Reads every regular file below `corpus` once, in chunks. {hits: [{task, share, ngrams,
    canaries, places}], unchecked, files, words, unreadable}.

    share: of the task's n-grams that are in the corpus. Raises ValueError where the corpus is no
    folder with files.
    """
    if not corpus.is_dir():
        raise ValueError(f"corpus {str(corpus)!r} is no folder; give the folder of its text files")
    grams = {task.name: set().union(*map(ngrams_of, texts_of(task))) for task in tasks}
    owners: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for name, found in grams.items():
        for gram in found:
            owners[gram].append(name)
    guids: dict[str, list[str]] = collections.defaultdict(list)
    for task in tasks:
        for guid in canaries_of(task):
            guids[guid].append(task.name)
    hits: dict[str, _Hits] = collections.defaultdict(_Hits)
    files, words, unreadable = 0, 0, []
    for path in _files(corpus):
        try:
            words += _scan(path, str(path.relative_to(corpus)), owners, guids, hits)
            files += 1
        except OSError as error:
            unreadable.append(f"{path.relative_to(corpus)}: {error.strerror}")
    if not files:
        raise ValueError(f"corpus {str(corpus)!r} holds no file that could be read")
    return {
        "corpus": str(corpus),
        "files": files,
        "words": words,
        "unreadable": unreadable,
        "unchecked": sorted(name for name, found in grams.items() if not found),
        "canaries_known": len(guids),
        "hits": [
            {
                "task": name,
                "share": round(len(hit.ngrams) / len(grams[name]), 4) if grams[name] else 0.0,
                "ngrams": len(hit.ngrams),
                "canaries": sorted(hit.canaries),
                "places": hit.places,
            }
            for name, hit in sorted(hits.items())
        ],
    }


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (
            path
            for name in sorted(names)
            if (path := pathlib.Path(root) / name).is_file() and not path.is_symlink()
        )


def _scan(
    path: pathlib.Path,
    shown: str,
    owners: Mapping[tuple[str, ...], list[str]],
    guids: Mapping[str, list[str]],
    hits: dict[str, _Hits],
) -> int:
    """Looks for everything in one file; returns how many words it has.

    A run of words may cross the chunks.
    """
    sizes = sorted({len(gram) for gram in owners})
    window: collections.deque[str] = collections.deque(maxlen=N)
    count, line = 0, 1
    for text in _chunks(path):
        for match in _GUID.finditer(text) if guids else ():
            for name in guids.get(match[0], ()):
                hits[name].canaries.add(match[0])
                hits[name].add(
                    {
                        "file": shown,
                        "line": line + text.count("\n", 0, match.start()),
                        "what": f"canary {match[0]}",
                    }
                )
        for match in _WORD.finditer(text):
            window.append(match[0])
            count += 1
            last = tuple(window)
            for size in sizes:
                gram = last[-size:]
                if len(last) < size or gram not in owners:
                    continue
                for name in owners[gram]:
                    if gram not in hits[name].ngrams:
                        hits[name].ngrams.add(gram)
                        hits[name].add(
                            {
                                "file": shown,
                                "line": line + text.count("\n", 0, match.start()),
                                "what": " ".join(gram),
                            }
                        )
        line += text.count("\n")
    return count


def _chunks(path: pathlib.Path) -> Iterator[str]:
    """The normalised text in pieces that end between words."""
    rest = ""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        while block := file.read(CHUNK_BYTES):
            block = rest + block
            cut = max(block.rfind(" "), block.rfind("\n"), 0)
            cut = cut if len(block) - cut <= LONGEST_WORD else len(block)
            rest = block[cut:]
            yield normalised(block[:cut])
    yield normalised(rest)


def write_contamination(out: pathlib.Path, dataset: str, found: Mapping[str, Any]) -> None:
    """OUT/contamination.json, contamination.md and contamination.html."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / "contamination.json", json.dumps({"dataset": dataset, **found}, indent=1) + "\n"
    )
    write_pages(
        out, "contamination", f"{dataset} in {found['corpus']}", contamination_tables(found)
    )


def contamination_tables(found: Mapping[str, Any]) -> list[Table]:
    def places(hit: Mapping[str, Any]) -> str:
        return "; ".join(
            f"{place['file']}:{place['line']}: {place['what']}" for place in hit["places"]
        )

    rows = [
        [hit["task"], f"{hit['share']:.2f}", ", ".join(hit["canaries"]), places(hit)]
        for hit in found["hits"]
    ]
    return [
        (
            f"{len(rows)} tasks found in {found['files']} files of {found['words']:,} words",
            ["task", f"share of its {N}-grams", "canaries", "first places"],
            rows,
        ),
        (
            f"Instructions of fewer than {FEWEST_WORDS} words, not checked",
            ["task"],
            [[name] for name in found["unchecked"]],
        ),
        ("Files that could not be read", ["file"], [[name] for name in found["unreadable"]]),
    ]
