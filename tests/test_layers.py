"""The rooms of the code and the arrows between them: imports point down, and never in a circle.

An arrow counts wherever it stands in a file: at its top, in a function, under TYPE_CHECKING.
"""

import ast
import pathlib
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

# A room may import itself, what is listed for it, and what these may import. `envs` is several
# rooms; the longest name that fits counts.
MAY_IMPORT = {
    "rome.version": [],
    "rome.files": [],
    "rome.own_code": [],
    "rome.stopping": [],
    "rome.model": ["rome.files"],
    "rome.data": ["rome.model", "rome.files", "rome.stopping", "rome.version"],
    "rome.losses": ["rome.data", "rome.own_code"],
    "rome.train": ["rome.model", "rome.data", "rome.losses", "rome.files", "rome.version"],
    "rome.cost": ["rome.train", "rome.serve"],
    "rome.serve": ["rome.model", "envs.gem"],
    "rome.engine": ["rome.serve", "rome.data", "envs.proxies"],
    "rome.agent": ["rome.engine", "envs.gem", "envs.rock"],
    "rome.rollout": ["rome.agent"],
    "rome.evals": ["rome.rollout", "rome.train", "envs.sources"],
    "rome.stages": ["rome.evals", "rome.rollout", "rome.train", "rome.cost", "rome.synth"],
    "rome.synth": ["rome.evals"],
    "envs.proxies": [],
    "envs.rock": [],
    "envs.gem": ["envs.rock", "envs.proxies"],
    "envs.tasks": ["envs.gem"],
    "envs.games": ["envs.gem"],
    "envs.problems": ["envs.tasks"],
    "envs.worlds": ["envs.games", "envs.tasks"],
    "envs.safety": ["envs.worlds", "envs.tasks"],
    "envs.sources": ["envs.safety", "envs.worlds", "envs.problems"],
    "experiments": [],
    "launch": ["rome.stages", "rome.evals", "rome.synth", "rome.serve", "experiments"],
    "benchmarks": ["launch"],
}
# Task contents: programs that agents work on or that grade them, not parts of the project.
CONTENTS = ("envs/tasks/harbor/examples", "envs/tasks/repair/packages")


def modules() -> dict[str, pathlib.Path]:
    """Return the file of each module of the product, by dotted name."""
    found = {}
    for top in ("rome", "envs", "experiments", "launch", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if str(relative).startswith(CONTENTS):
                continue
            name = ".".join(relative.with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> Iterator[str]:
    """Yield the modules of the product that a file imports, wherever the import stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in known:
                    yield target
                elif base in known:
                    yield base


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Return what each module imports. A package's own __init__ imports its modules: no arrow."""
    known = modules()
    return {
        name: {target for target in imports(name, path, known) if target != name}
        for name, path in known.items()
    }


def room_of(module: str, rooms: dict[str, list[str]]) -> str | None:
    """Return the room of a module: the longest of the names that it begins with."""
    fitting = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


def reachable(room: str, rooms: dict[str, list[str]]) -> set[str]:
    """Return the rooms that a room may import, itself included."""
    found, waiting = {room}, [room]
    while waiting:
        for below in rooms[waiting.pop()]:
            if below not in found:
                found.add(below)
                waiting.append(below)
    return found


def arrows_up(graph: dict[str, set[str]], rooms: dict[str, list[str]]) -> list[str]:
    """Return the imports that the table of rooms does not allow."""
    wrong = []
    for module, targets in graph.items():
        room = room_of(module, rooms)
        for target in sorted(targets):
            below = room_of(target, rooms)
            if room and below and below not in reachable(room, rooms):
                wrong.append(f"{module} -> {target}: {room} may not import {below}")
    return wrong


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_every_module_has_a_room(graph):
    homeless = [m for m in graph if room_of(m, MAY_IMPORT) is None and m not in ("rome", "envs")]
    assert not homeless, "add these to MAY_IMPORT, with what they may import"


def test_no_arrow_points_up(graph):
    assert arrows_up(graph, MAY_IMPORT) == []


def test_no_two_modules_import_each_other(graph):
    assert circles(graph) == []


def test_the_environments_know_nothing_of_jax(graph):
    for name, path in modules().items():
        if name.startswith("envs"):
            tree = ast.parse(path.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not {n for n in names if n.split(".")[0] in ("jax", "flax", "rome")}, name


def test_the_checks_see_what_they_look_for():
    rooms = {"low": [], "high": ["low"]}
    assert arrows_up({"low.a": {"high.b"}, "high.b": {"low.a"}}, rooms) == [
        "low.a -> high.b: low may not import high"
    ]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
