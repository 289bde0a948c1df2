"""Test-driven steps: a program grows function by function, in the order of what its tests run.

The tests of the newest tree are traced in a sandbox. Each step takes the test that needs the fewest
functions which no earlier step has written, so a function comes after those that it calls at run
time, where these have tests of their own. A step is kept if its test fails on the tree without its
functions and passes on the tree with them; functions of later steps are stubs in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rome.synth.cpt.commits import is_test, show_files
from rome.synth.cpt.document import Document, SetAside, make_document
from rome.synth.cpt.edits import EditError, write_edits
from rome.synth.cpt.execute import Runs, Traced, Tree
from rome.synth.cpt.functions import functions_of, source_of, without_bodies
from rome.synth.cpt.repository import Repository

MAX_TEST_MODULES = 200
MAX_STEPS = 40  # of a repository
MAX_NEW_FUNCTIONS = 8  # of a step
MAX_SHOWN_CHARACTERS = 60_000
TREES_A_RUN = 12

Place = tuple[str, str]  # a file, and a function in it


@dataclasses.dataclass(frozen=True)
class Step:
    """A test, and the functions that it needs beyond those of earlier steps, callees first."""

    test: str
    functions: tuple[Place, ...]


async def step_documents(
    repository: Repository, texts: Mapping[str, str], runs: Runs
) -> tuple[list[Document], list[SetAside]]:
    """Return the steps of a repository's newest tree, and why others are not there.

    Args:
      repository: of the tree.
      texts: path -> text of all its files.
      runs: runs tests in sandboxes.
    """
    place = str(repository.folder)
    modules: list[str] = []
    lacking = ""
    for path in sorted(texts):
        if not (is_test(path) and runs.takes(path)) or len(modules) >= MAX_TEST_MODULES:
            continue
        package = await runs.lacking([texts[path]])
        lacking = lacking or package
        if not package:
            modules.append(path)
    if not modules:
        needed = f" without {lacking}" if lacking else ""
        return [], [SetAside(place, "steps", f"no Python tests to run{needed} are in its tree")]
    traced = await runs.trace(texts, [Tree({}, modules, trace=True), Tree({}, modules)])
    if isinstance(traced, str):
        return [], [SetAside(place, "steps", traced)]
    first, again = traced
    stable = {
        test
        for test, outcome in first.outcomes.items()
        if outcome == "passed" and again.outcomes.get(test) == "passed"
    }
    steps = plan_steps(texts, first, stable)
    if not steps:
        reason = f"{len(stable)} of {len(first.outcomes)} tests pass, and none needs a function"
        return [], [SetAside(place, "steps", reason)]
    return await _prove(repository, texts, steps, runs)


def plan_steps(texts: Mapping[str, str], traced: Traced, tests: set[str]) -> list[Step]:
    """Return the steps of a trace.

    Args:
      texts: path -> text of the tree.
      traced: what its tests ran.
      tests: those that may be steps.
    """
    known = _places(texts)
    at_import = {known[key] for key in traced.functions.get("", ()) if key in known}
    needs = {
        test: {known[key] for key in traced.functions.get(test, ()) if key in known} - at_import
        for test in sorted(tests)
    }
    edges = {
        (known[caller], known[callee])
        for caller, callee in traced.edges
        if caller in known and callee in known
    }
    done: set[Place] = set()
    steps: list[Step] = []
    waiting = {test: need for test, need in needs.items() if need}
    while waiting and len(steps) < MAX_STEPS:
        test = min(waiting, key=lambda one: (len(waiting[one] - done), one))
        new = waiting.pop(test) - done
        done |= new
        if 0 < len(new) <= MAX_NEW_FUNCTIONS:
            steps.append(Step(test, tuple(_callees_first(new, edges))))
    return steps


def _places(texts: Mapping[str, str]) -> dict[tuple[str, int], Place]:
    """Return (file, first line) -> function, of all functions that can be left out."""
    return {
        (path, function.first): (path, function.name)
        for path, text in texts.items()
        if path.endswith(".py") and not is_test(path)
        for function in functions_of(text)
    }


def _callees_first(new: set[Place], edges: set[tuple[Place, Place]]) -> list[Place]:
    """Return functions in an order in which each comes after those that it calls."""
    order: list[Place] = []
    seen: set[Place] = set()

    def visit(function: Place) -> None:
        if function in seen:
            return
        seen.add(function)
        for caller, callee in sorted(edges):
            if caller == function and callee in new:
                visit(callee)
        order.append(function)

    for function in sorted(new):
        visit(function)
    return order


def tree_after(texts: Mapping[str, str], steps: list[Step], done: int) -> dict[str, str]:
    """Return the files that differ from the whole tree after so many steps."""
    missing: dict[str, set[str]] = {}
    for step in steps[done:]:
        for path, name in step.functions:
            missing.setdefault(path, set()).add(name)
    return {
        path: without_bodies(
            texts[path], [one for one in functions_of(texts[path]) if one.name in names]
        )
        for path, names in missing.items()
    }


async def _prove(
    repository: Repository, texts: Mapping[str, str], steps: list[Step], runs: Runs
) -> tuple[list[Document], list[SetAside]]:
    """Return the documents of steps whose tests fail before and pass after."""
    trees = []
    for number, step in enumerate(steps):
        module = [step.test.split("::")[0]]
        for done in (number, number + 1):  # whole modules would take many times as long
            trees.append(Tree(tree_after(texts, steps, done), module, tests=[step.test]))
    outcomes: list[dict[str, str]] = []
    place = str(repository.folder)
    for start in range(0, len(trees), TREES_A_RUN):
        found = await runs.run(texts, trees[start : start + TREES_A_RUN])
        if isinstance(found, str):
            return [], [SetAside(place, "steps", found)]
        outcomes += found
    documents = []
    aside = []
    for number, step in enumerate(steps):
        before, after = outcomes[2 * number : 2 * number + 2]
        if before.get(step.test) == "passed" or after.get(step.test) != "passed":
            reason = "its test does not tell the tree before from the one after"
            aside.append(SetAside(place, f"step {step.test}", reason))
            continue
        made = _document(repository, texts, steps, number)
        if isinstance(made, str):
            aside.append(SetAside(place, f"step {step.test}", made))
        else:
            documents.append(made)
    return documents, aside


def _document(
    repository: Repository, texts: Mapping[str, str], steps: list[Step], number: int
) -> Document | str:
    step = steps[number]
    paths = sorted({path for path, _ in step.functions})
    before = dict(texts) | tree_after(texts, steps, number)
    after = dict(texts) | tree_after(texts, steps, number + 1)
    shown = {path: before[path] for path in paths}
    module, _, name = step.test.partition("::")
    name = name.partition("[")[0]  # what pytest writes there are the values of parameters
    test = source_of(texts[module], name.replace("::", "."))
    if not test or sum(map(len, shown.values())) > MAX_SHOWN_CHARACTERS:
        return f"its test is not found, or its files have more than {MAX_SHOWN_CHARACTERS} letters"
    try:
        blocks = write_edits(shown, {path: after[path] for path in paths})
    except EditError as error:
        return str(error)
    wanted = "\n".join(f"- {path}: {function}" for path, function in step.functions)
    text = (
        f"# Repository {repository.name}, step {number + 1} of {len(steps)}\n\n"
        f"## Test\n{show_files({module: test})}\n## Files\n{show_files(shown)}\n"
        f"## Functions to write, callees first\n{wanted}\n\n## Change\n{blocks}"
    )
    origin = {
        "repository": repository.name,
        "commit": repository.head,
        "licence": repository.licence,
        "test": step.test,
        "step": number + 1,
    }
    return make_document("steps", [text], origin)
