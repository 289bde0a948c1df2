"""Units of work of a corpus: each makes its documents once and keeps them in a file of its own."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from envs.tasks.git import RepositoryError
from rome.files import write_atomically
from rome.model.tokenizer import Tokenizer
from rome.synth.cpt.commits import is_test, localisation_document, repair_document, tests_document
from rome.synth.cpt.document import Document, Fault, SetAside, document_of
from rome.synth.cpt.execute import Runs
from rome.synth.cpt.repository import Commit, Repository, list_paths, read_commit, read_tree
from rome.synth.cpt.steps import step_documents
from rome.synth.cpt.texts import file_documents, repository_documents
from rome.synth.cpt.trajectories import trajectory_documents


@dataclasses.dataclass
class Made:
    """What a unit has made.

    Attributes:
      documents: in order.
      aside: inputs that were not used.
      reasons: (kind, reason) -> how many candidates for documents left for it.
      counts: of inputs, by name.
      seconds: of wall time by stage.
      is_fault: whether the machine was at fault for what is missing.
    """

    documents: list[Document] = dataclasses.field(default_factory=list)
    aside: list[SetAside] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    is_fault: bool = False

    def take(self, kind: str, found: Document | str, began: float) -> None:
        """Keep a document, or count the reason why there is none."""
        self.seconds[kind] += time.monotonic() - began
        self.counts[f"candidates for {kind}"] += 1
        if isinstance(found, Document):
            self.documents.append(found)
        else:
            self.reasons[kind, _general(found)] += 1
            self.is_fault = self.is_fault or isinstance(found, Fault)


def _general(reason: str) -> str:
    """Return a reason without the path that it is about, so that equal ones are counted as one."""
    words = [word for word in reason.split() if "/" not in word and "." not in word.strip(".:")]
    return " ".join("N" if word.isdecimal() else word for word in words)[:160]


Work = Callable[[], Awaitable[Made]]


async def finished(path: pathlib.Path, work: Work) -> bool:
    """Do a unit's work unless its file is there; return whether it was done now.

    The file holds a line of what was counted, and a line a document. It is there whole or not. One
    that lacks documents by a fault of the machine is made again.
    """
    if path.exists() and not read_head(path).is_fault:
        return False
    made = await work()
    head = {
        "aside": made.aside,
        "reasons": [[kind, reason, count] for (kind, reason), count in made.reasons.items()],
        "counts": made.counts,
        "seconds": made.seconds,
        "is_fault": made.is_fault,
    }
    lines = [json.dumps(head) + "\n", *(document.to_line() for document in made.documents)]
    write_atomically(path, "".join(lines))
    return True


def read_head(path: pathlib.Path) -> Made:
    """Return what a unit counted, without its documents."""
    with open(path, encoding="utf-8") as file:
        head: dict[str, Any] = json.loads(file.readline())
    return Made(
        aside=[SetAside(*one) for one in head["aside"]],
        reasons=collections.Counter({(kind, why): count for kind, why, count in head["reasons"]}),
        counts=collections.Counter(head["counts"]),
        seconds=collections.defaultdict(float, head["seconds"]),
        is_fault=head.get("is_fault", False),
    )


def read_documents(path: pathlib.Path) -> Iterator[Document]:
    """Yield the documents of a unit."""
    with open(path, encoding="utf-8") as file:
        file.readline()
        for line in file:
            yield document_of(json.loads(line))


# -- the units
# -------------------------------------------------------------------------------------------------


async def work_on_files(repository: Repository, fim_share: float, seed: int) -> Made:
    """Make the documents of files and of whole repositories."""
    made = Made()
    began = time.monotonic()
    try:
        texts, made.aside = read_tree(repository)
    except RepositoryError as error:
        made.aside.append(SetAside(str(repository.folder), "tree", str(error)))
        return made
    made.counts["files"] = len(texts) + len(made.aside)
    made.documents += file_documents(repository, texts, fim_share, seed)
    made.counts["candidates for file"] = len(made.documents)
    several = list(repository_documents(repository, texts, fim_share, seed))
    made.counts["candidates for repository"] = len(several)
    made.documents += several
    made.seconds["file"] += time.monotonic() - began
    return made


async def work_on_commits(repository: Repository, commits: list[str], runs: Runs | None) -> Made:
    """Make the documents of some commits: localisation, repair, unit tests."""
    made = Made()
    for identity in commits:
        made.counts["commits"] += 1
        began = time.monotonic()
        try:
            commit = read_commit(repository, identity)
        except (RepositoryError, ValueError) as error:
            made.aside.append(SetAside(str(repository.folder), identity, str(error)))
            continue
        finally:
            made.seconds["reading commits"] += time.monotonic() - began
        if isinstance(commit, str):
            made.reasons["commit", _general(commit)] += 1
            continue
        made.counts["commits read"] += 1
        await _work_on_commit(repository, commit, runs, made)
    return made


async def _work_on_commit(
    repository: Repository, commit: Commit, runs: Runs | None, made: Made
) -> None:
    began = time.monotonic()
    try:
        paths = {*list_paths(repository, commit.id), *commit.before}
    except (RepositoryError, ValueError) as error:
        made.aside.append(SetAside(str(repository.folder), commit.id, str(error)))
        return
    paths -= {path for path in commit.after if path not in commit.before}
    made.take("localisation", localisation_document(repository, commit, sorted(paths)), began)
    began = time.monotonic()
    made.take("repair", repair_document(repository, commit), began)
    if runs is not None and any(is_test(path) and runs.takes(path) for path in commit.after):
        began = time.monotonic()
        made.take("tests", await tests_document(repository, commit, runs), began)


async def work_on_steps(repository: Repository, runs: Runs) -> Made:
    """Make the test-driven steps of the newest tree."""
    made = Made()
    began = time.monotonic()
    try:
        texts, _ = read_tree(repository)
        documents, made.aside = await step_documents(repository, texts, runs)
    except (RepositoryError, ValueError) as error:
        made.aside.append(SetAside(str(repository.folder), "steps", str(error)))
        return made
    made.documents += documents
    made.is_fault = any(isinstance(one.reason, Fault) for one in made.aside)
    made.counts["candidates for steps"] = len(documents) + len(made.aside)
    made.seconds["steps"] += time.monotonic() - began
    return made


async def work_on_trajectories(spec: str, tokenizer: Tokenizer) -> Made:
    """Make the documents of trajectories."""
    made = Made()
    began = time.monotonic()
    made.documents, made.aside, counts = trajectory_documents(spec, tokenizer)
    made.counts.update({f"trajectories {name}": number for name, number in counts.items()})
    made.counts["candidates for trajectory"] = len(made.documents)
    made.seconds["trajectory"] += time.monotonic() - began
    return made
