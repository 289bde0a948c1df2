"""BFCL's own form: classes of a package, their errors as answers, several calls in a step.

The package here has the layout of `bfcl-eval` and two small classes of ours. Where the authors'
package is installed, all of its entries are played and compared with its own checker.
"""

import importlib
import json
import random
import sys

import pytest

from envs.gem import format_tool_call
from envs.sources import load_tasks
from envs.worlds import bfcl, bfcl_authors
from envs.worlds.published import FormatError
from tests.envs.worlds.playing import play

CONFIG = """
MULTI_TURN_FUNC_DOC_FILE_MAPPING = {"TicketAPI": "ticket_api.json", "MathAPI": "math_api.json"}
CLASS_FILE_PATH_MAPPING = {"TicketAPI": "bfcl_eval.classes", "MathAPI": "bfcl_eval.classes"}
"""
CLASSES = """
class MathAPI:
    def add(self, a, b):
        return {"result": a + b}


class TicketAPI:
    def __init__(self):
        self._secret = object()

    def _load_scenario(self, scenario, long_context=False):
        self.queue = {int(key): value for key, value in scenario["queue"].items()}
        self.queue |= {"long": "yes"} if long_context else {}
        self._loads = scenario.get("loads", 1) + 1

    def create_ticket(self, title, description="", priority=1):
        if not 1 <= priority <= 5:
            raise ValueError("Invalid priority")
        number = len(self.queue) + 1
        self.queue[number] = {"title": title, "priority": priority}
        return {"id": number}

    def get_ticket(self, name):
        return self.queue.get(name, {"error": f"Ticket with ID {name} not found."})

    def status(self):
        return ("open", len(self.queue))
"""


def document(name, required=(), /, **types):
    properties = {key: {"type": kind, "description": key} for key, kind in types.items()}
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    return {"name": name, "description": f"Tool description: {name}.", "parameters": parameters}


DOCUMENTS = {
    "ticket_api.json": [
        document("create_ticket", ["title"], priority="integer", title="string", description="any"),
        document("get_ticket", ["name"], name="integer"),
        document("status"),
    ],
    "math_api.json": [document("add", ["a", "b"], a="float", b="float")],
}
ENTRY = {
    "id": "multi_turn_base_0",
    "question": [
        [{"role": "user", "content": "Open a ticket, then look at it."}],
        [],
        [{"role": "user", "content": "Sum it up."}],
    ],
    "initial_config": {"TicketAPI": {"queue": {"1": {"title": "old", "priority": 2}}}},
    "path": [],
    "involved_classes": ["TicketAPI", "MathAPI"],
    "missed_function": {"1": ["status"]},
}
TRUTH = {
    "id": "multi_turn_base_0",
    "ground_truth": [
        ["create_ticket('new', priority=3)", "get_ticket(name=2)", "get_ticket(name=9)"],
        ["status()"],
        ["add(a=1,b=2.5)", "create_ticket(title='x', priority=9)"],
    ],
}
RIGHT = [
    [
        format_tool_call("create_ticket", {"title": "new", "priority": "3"}),
        format_tool_call("get_ticket", {"name": 2})
        + "\n"
        + format_tool_call("get_ticket", {"name": 9}),
    ],
    [format_tool_call("status", {})],
    [
        format_tool_call("add", {"a": 1, "b": 2.5})
        + format_tool_call("create_ticket", {"title": "x", "priority": 9})
    ],
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the authors' layout, importable while the test runs."""
    root = tmp_path / "bfcl_eval"
    (root / "constants").mkdir(parents=True)
    (root / "data" / "multi_turn_func_doc").mkdir(parents=True)
    (root / "data" / "possible_answer").mkdir()
    for name in ("__init__.py", "constants/__init__.py"):
        (root / name).write_text("")
    (root / "constants" / "executable_backend_config.py").write_text(CONFIG)
    (root / "constants" / "default_prompts.py").write_text(
        "DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC = 'There are more.'\n"
    )
    (root / "classes.py").write_text(CLASSES)
    for name, rows in DOCUMENTS.items():
        (root / "data" / "multi_turn_func_doc" / name).write_text("\n".join(map(json.dumps, rows)))
    for folder, line in ((root / "data", ENTRY), (root / "data" / "possible_answer", TRUTH)):
        (folder / "BFCL_v4_multi_turn_base.json").write_text(json.dumps(line))

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
            del sys.modules[name]
        bfcl_authors.tools_of.cache_clear()
        importlib.invalidate_caches()

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield root
    forget()


def with_done(*by_turn):
    return [action for turn in by_turn for action in (*turn, "done")]


def test_entries_of_the_package_are_played_with_its_classes(package):
    (task,) = load_tasks("bfcl:multi_turn_base")
    (entry,) = bfcl.load_dataset("multi_turn_base")
    env = entry.make_env()
    env.reset()
    reward, info, seen = play(env, env.scenario.demonstration)
    assert (reward, info["step_counter"], task.name) == (1.0, 6, "multi_turn_base_0")
    assert '{"id": 2}\n{"title": "new", "priority": 3}' in seen[1]
    assert "There are more." in seen[2] and '"name": "status"' in seen[2]
    assert "('open', 2)" in seen[3] and "Error during execution: Invalid priority" in seen[5]
    assert play(env, with_done(*RIGHT))[0] == 1.0
    assert play(env, [])[0] == 0.0
    assert all(play(env, actions)[0] == 0.0 for actions in env.cheats().values())


def test_schemas_are_the_authors_with_the_types_of_json(package):
    (entry,) = bfcl.load_dataset("multi_turn_base")
    _, info = entry.make_env().reset()
    functions = {tool["function"]["name"]: tool["function"] for tool in info["tools"]}
    assert set(functions) == {"create_ticket", "get_ticket", "add"}  # `status` comes later
    create = functions["create_ticket"]["parameters"]
    assert create["required"] == ["title"] and create["type"] == "object"
    types = {name: schema["type"] for name, schema in create["properties"].items()}
    assert types == {"title": "string", "description": "string", "priority": "integer"}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda turns: turns[0].pop(), "answers of the true calls were never seen"),
        (lambda turns: turns[0].append(format_tool_call("create_ticket", {"title": "y"})), "queue"),
        (lambda turns: turns[1].clear(), "turn 1: no call"),
        (lambda turns: turns[2].__setitem__(0, format_tool_call("nothing", {})), "never seen"),
    ],
)
def test_what_differs_from_the_true_calls_is_said(package, change, note):
    (entry,) = bfcl.load_dataset("multi_turn_base")
    turns = [list(turn) for turn in RIGHT]
    change(turns)
    reward, info, _ = play(entry.make_env(), with_done(*turns))
    assert reward == 0.0 and note in info["note"], info


def test_errors_of_the_classes_are_tool_errors_and_end_nothing(package):
    (entry,) = bfcl.load_dataset("multi_turn_base")
    env = entry.make_env()
    env.reset()
    for arguments in ({}, {"title": 1, "nothing": 2}, {"title": "x", "priority": "many"}):
        observation, *_, info = env.step(format_tool_call("create_ticket", arguments))
        assert observation.startswith("Error during execution: ") and info["status"] == "tool_error"


def test_long_context_is_told_to_the_classes(package):
    data = package / "data"
    for folder, line in ((data, ENTRY), (data / "possible_answer", TRUTH)):
        line = {**line, "id": "multi_turn_long_context_0"}
        (folder / "BFCL_v4_multi_turn_long_context.json").write_text(json.dumps(line))
    (entry,) = bfcl.load_dataset("multi_turn_long_context")
    assert entry.make_state()["TicketAPI"].queue["long"] == "yes"


def test_a_copy_goes_on_with_a_state_of_its_own(package):
    (entry,) = bfcl.load_dataset("multi_turn_base")
    env = entry.make_env()
    env.reset()
    twin = env.spawn(same_state=True)
    env.step(RIGHT[0][0])
    assert 2 in env.database["TicketAPI"].queue and 2 not in twin.database["TicketAPI"].queue


def test_without_the_package_it_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(bfcl_authors, "is_installed", lambda: False)
    bfcl_authors.tools_of.cache_clear()
    with pytest.raises(FormatError, match="pip install --no-deps bfcl-eval mpmath"):
        load_tasks("bfcl:multi_turn_base")
    with pytest.raises(FormatError, match=r"neither a file nor one of multi_turn, multi_turn_base"):
        load_tasks("bfcl:simple_python")
    file = tmp_path / "mine.json"
    (tmp_path / "possible_answer").mkdir()
    file.write_text(json.dumps(ENTRY))
    (tmp_path / "possible_answer" / "mine.json").write_text(json.dumps(TRUTH))
    with pytest.raises(FormatError, match=r"mine.json:1: TicketAPI needs the code of"):
        load_tasks(f"bfcl:{file}")


# -- The authors' own package
# -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_published_entries_and_the_authors_own_checker():
    """799 of 800 truths count: one calls a function before the entry makes it available."""
    checker = pytest.importorskip("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
    bfcl_authors.tools_of.cache_clear()
    entries = bfcl.load_dataset("multi_turn")
    raw = {}
    for path in bfcl_authors.files_of("multi_turn"):
        for line in path.read_text().splitlines():
            raw[json.loads(line)["id"]] = json.loads(line)
    failed = []
    rng = random.Random(7)
    for number, entry in enumerate(entries):
        env = entry.make_env()
        env.reset()
        if play(env, env.scenario.demonstration)[0] != 1.0:
            failed.append(entry.name)
        assert play(env, [])[0] == 0.0, entry.name
        if number % 8 == 0 and not entry.missed:
            _agrees_with(checker, env, entry, raw[entry.name], rng)
    assert len(entries) == 800 and failed == ["multi_turn_miss_func_49"]


def _agrees_with(checker, env, entry, raw, rng):
    """Leave out, repeat or keep true calls, and compare the reward with the authors' verdict."""
    turns = [[call for call in turn if rng.random() > 0.1] for turn in entry.truth]
    if rng.random() < 0.5:
        turns = [[*turn, *turn[:1]] if rng.random() < 0.2 else turn for turn in turns]
    actions = []
    for turn in turns:
        actions += [format_tool_call(call.name, call.arguments) for call in turn] + ["done"]
    written = [[[_python(call)] for call in turn] for turn in turns]
    truth = [[_python(call) for call in turn] for turn in entry.truth]
    category = entry.name.rsplit("_", 1)[0]
    verdict = checker.multi_turn_checker(written, truth, raw, category, f"model{rng.random()}")
    assert play(env, actions)[0] == float(verdict["valid"]), (entry.name, verdict)


def _python(call):
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"
