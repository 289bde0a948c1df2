"""Searches a text corpus for the tasks of a dataset: shared runs of 13 words, and canary strings.

Words are runs of letters and digits, compatibility-normalised (NFKC) and case-folded, so that
markup, punctuation and line breaks hide nothing; nor do the escapes of JSON, in which most corpora
are kept. An instruction of fewer than 13 words is searched
for as a whole, down to 8; a shorter one says too little and is reported as not checked. A canary is
the GUID of a line that has the word "canary"; the loader hides it from the agent, so it is read
from the task's files.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envs.sources import Task
from rome.evals.report import Table, write_pages
from rome.files import write_atomically

N = 13  # words of an n-gram
MIN_WORDS = 8  # of an instruction that is checked
CHUNK_BYTES = 1 << 20
# Longest word that the end of a chunk is moved for; more without a space is not text.
MAX_WORD_CHARACTERS = 1 << 12
MAX_CANARY_FILE_BYTES = 1 << 20
MAX_PLACES = 5  # shown of each hit
# First bytes of files whose text is packed: searched as they are, they would pass for clean.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
}
_BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
NGram = tuple[str, ...]
_WORD = re.compile(r"[^\W_]+")
# A line break, tabulator or letter as JSON spells it, also where that text was escaped once more.
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|[bfnrt])")
_GUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")


# -- what is searched for
# -------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Return the normalised words of a text."""
    return _WORD.findall(normalised(text))


def normalised(text: str) -> str:
    """Return the text in compatibility form and case-folded, with the line breaks that it has.

    Escapes are undone in tasks and corpora alike, so a text that means its backslashes still equals
    its copy.
    """
    if "\\" in text:
        text = _ESCAPE.sub(_unescaped, text)
    return unicodedata.normalize("NFKC", text).casefold()


def _unescaped(match: re.Match[str]) -> str:
    """Return the letter of an escape; a blank for what only separates words."""
    code = int(match[1], 16) if match[1] else 0
    return chr(code) if code > 0x20 else " "


def ngrams_of(text: str) -> set[NGram]:
    """Return the runs of 13 words of a text.

    A text of 8 to 12 words is one run; a shorter one has none.
    """
    words = words_of(text)
    size = min(N, len(words))
    if size < MIN_WORDS:
        return set()
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def _ngrams_of_task(task: Task) -> set[NGram]:
    """Return the n-grams of a task's instructions; none crosses from one step to the next."""
    found: set[NGram] = set()
    for text in task.content.texts:
        found |= ngrams_of(text)
    return found


def canaries_of(task: Task) -> set[str]:
    """Return the lower-case GUIDs of the lines in a task's files that have the word "canary"."""
    if task.path is None:
        return set()
    found: set[str] = set()
    for path in sorted(task.path.rglob("*")):
        is_readable = path.is_file() and not path.is_symlink()
        if not is_readable or path.stat().st_size > MAX_CANARY_FILE_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="replace").lower()
        for line in text.splitlines():
            if "canary" in line:
                found.update(_GUID.findall(line))
    return found


# -- the search
# -------------------------------------------------------------------------------------------------


class PackedError(ValueError):
    """A file holds its text in a packed form."""


@dataclasses.dataclass
class _Hits:
    """What was found of one task."""

    ngrams: set[NGram] = dataclasses.field(default_factory=set)
    canaries: set[str] = dataclasses.field(default_factory=set)
    places: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add_place(self, file: str, line: int, what: str) -> None:
        if len(self.places) < MAX_PLACES:
            self.places.append({"file": file, "line": line, "what": what})


class TaskIndex:
    """What tells that a text holds a task: n-grams of its instructions, and its canaries.

    Args:
      tasks: that are searched for.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.ngrams: dict[str, set[NGram]] = {}
        for task in tasks:  # tasks of different sets may share a name
            self.ngrams[task.name] = self.ngrams.get(task.name, set()) | _ngrams_of_task(task)
        self.ngram_owners: dict[NGram, list[str]] = collections.defaultdict(list)
        for name, found in self.ngrams.items():
            for ngram in found:
                self.ngram_owners[ngram].append(name)
        self.canary_owners: dict[str, list[str]] = collections.defaultdict(list)
        for task in tasks:
            for canary in canaries_of(task):
                self.canary_owners[canary].append(task.name)
        self._sizes_of_head: dict[NGram, set[int]] = collections.defaultdict(set)
        for ngram in self.ngram_owners:
            self._sizes_of_head[ngram[:MIN_WORDS]].add(len(ngram))

    def owners_named(self, name: str) -> set[str]:
        """Return the tasks of this name, whatever source of a mixture stands before it.

        It tells the attempts at tasks whose instructions are too short to be searched for.
        """
        wanted = name.rpartition("#")[2]
        return {one for one in self.ngrams if wanted and one.rpartition("#")[2] == wanted}

    def owners_in(self, text: str) -> set[str]:
        """Return the names of the tasks that share an n-gram or a canary with a text."""
        shown = normalised(text)
        found: set[str] = set()
        if self.canary_owners:
            for match in _GUID.finditer(shown):
                found.update(self.canary_owners.get(match[0], ()))
        words = _WORD.findall(shown)
        for start in range(len(words) - MIN_WORDS + 1):
            head = tuple(words[start : start + MIN_WORDS])
            for size in self._sizes_of_head.get(head, ()):
                ngram = tuple(words[start : start + size])
                found.update(self.ngram_owners.get(ngram, ()))
        return found


def find_contamination(tasks: Sequence[Task], corpus: pathlib.Path) -> dict[str, Any]:
    """Search every regular file of a folder for the tasks, reading each once.

    Args:
      tasks: searched for.
      corpus: folder of text files.

    Returns:
      hits: [{task, share, ngrams, canaries, places}], with the share of the task's n-grams that are
        in the corpus; unchecked: tasks with too short instructions; files and words that were read;
        unreadable: files that were not.

    Raises:
      ValueError: the corpus is not a folder, or has no file that can be read.
    """
    if not corpus.is_dir():
        raise ValueError(f"corpus {str(corpus)!r} is no folder; give the folder of its text files")
    index = TaskIndex(tasks)
    hits: dict[str, _Hits] = collections.defaultdict(_Hits)
    num_files = 0
    num_words = 0
    unreadable = []
    for path in _list_files(corpus):
        shown = str(path.relative_to(corpus))
        try:
            num_words += _scan(path, shown, index.ngram_owners, index.canary_owners, hits)
            num_files += 1
        except OSError as error:
            unreadable.append(f"{shown}: {error.strerror}")
        except PackedError as error:
            unreadable.append(f"{shown}: {error}")
    if num_files == 0:
        more = f": {unreadable[0]}" if unreadable else ""
        raise ValueError(f"corpus {str(corpus)!r} holds no file that could be read{more}")
    return {
        "corpus": str(corpus),
        "files": num_files,
        "words": num_words,
        "unreadable": unreadable,
        "unchecked": sorted(name for name, found in index.ngrams.items() if not found),
        "canaries_known": len(index.canary_owners),
        "hits": [
            _describe_hit(name, hit, index.ngrams[name]) for name, hit in sorted(hits.items())
        ],
    }


def _describe_hit(name: str, hit: _Hits, ngrams: set[NGram]) -> dict[str, Any]:
    return {
        "task": name,
        "share": round(len(hit.ngrams) / len(ngrams), 4) if ngrams else 0.0,
        "ngrams": len(hit.ngrams),
        "canaries": sorted(hit.canaries),
        "places": hit.places,
    }


def _list_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the regular files below a folder, in a fixed order."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = pathlib.Path(root) / name
            if path.is_file() and not path.is_symlink():
                yield path


def _scan(
    path: pathlib.Path,
    shown: str,
    ngram_owners: Mapping[NGram, list[str]],
    canary_owners: Mapping[str, list[str]],
    hits: dict[str, _Hits],
) -> int:
    """Search one file for everything, and return its number of words.

    Args:
      path: the file.
      shown: its name in the places of hits.
      ngram_owners: n-gram -> tasks that have it.
      canary_owners: canary -> tasks that have it.
      hits: by task; added to.
    """
    sizes = sorted({len(ngram) for ngram in ngram_owners})
    window: collections.deque[str] = collections.deque(maxlen=N)  # also across chunks
    num_words = 0
    first_line = 1
    for text in _read_chunks(path):
        if canary_owners:
            _scan_canaries(text, first_line, shown, canary_owners, hits)
        for match in _WORD.finditer(text):
            window.append(match[0])
            num_words += 1
            last_words = tuple(window)
            for size in sizes:
                ngram = last_words[-size:]
                if len(last_words) < size or ngram not in ngram_owners:
                    continue
                for name in ngram_owners[ngram]:
                    if ngram not in hits[name].ngrams:
                        line = first_line + text.count("\n", 0, match.start())
                        hits[name].ngrams.add(ngram)
                        hits[name].add_place(shown, line, " ".join(ngram))
        first_line += text.count("\n")
    return num_words


def _scan_canaries(
    text: str,
    first_line: int,
    shown: str,
    canary_owners: Mapping[str, list[str]],
    hits: dict[str, _Hits],
) -> None:
    """Search one chunk of a file for canaries."""
    for match in _GUID.finditer(text):
        for name in canary_owners.get(match[0], ()):
            line = first_line + text.count("\n", 0, match.start())
            hits[name].canaries.add(match[0])
            hits[name].add_place(shown, line, f"canary {match[0]}")


def _read_chunks(path: pathlib.Path) -> Iterator[str]:
    """Yield the normalised text of a file in pieces that end between words.

    Raises:
      PackedError: its text is compressed, or in a columnar format.
    """
    with open(path, "rb") as raw:
        head = raw.read(8)
    for magic, name in _PACKED.items():
        if head.startswith(magic):
            raise PackedError(f"it is packed ({name}); unpack it into text")
    encoding = _BOMS.get(head[:2], "utf-8")
    rest = ""
    with open(path, encoding=encoding, errors="replace", newline="\n") as file:
        while block := file.read(CHUNK_BYTES):
            block = rest + block
            cut = max(block.rfind(" "), block.rfind("\n"), 0)
            if len(block) - cut > MAX_WORD_CHARACTERS:
                cut = len(block)
            rest = block[cut:]
            yield normalised(block[:cut])
    yield normalised(rest)


# -- the report
# -------------------------------------------------------------------------------------------------


def write_contamination(out: pathlib.Path, dataset: str, found: Mapping[str, Any]) -> None:
    """Write OUT/contamination.json, contamination.md and contamination.html."""
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"dataset": dataset, **found}, indent=1) + "\n"
    write_atomically(out / "contamination.json", content)
    title = f"{dataset} in {found['corpus']}"
    write_pages(out, "contamination", title, contamination_tables(found))


def contamination_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the pages."""
    hits = []
    for hit in found["hits"]:
        places = [f"{place['file']}:{place['line']}: {place['what']}" for place in hit["places"]]
        canaries = ", ".join(hit["canaries"])
        hits.append([hit["task"], f"{hit['share']:.2f}", canaries, "; ".join(places)])
    return [
        Table(
            f"{len(hits)} tasks found in {found['files']} files of {found['words']:,} words",
            ["task", f"share of its {N}-grams", "canaries", "first places"],
            hits,
        ),
        Table(
            f"Instructions of fewer than {MIN_WORDS} words, not checked",
            ["task"],
            [[name] for name in found["unchecked"]],
        ),
        Table("Files that could not be read", ["file"], [[name] for name in found["unreadable"]]),
    ]
