"""BFCL's own classes and files, where the authors' package `bfcl-eval` is installed.

    pip install --no-deps bfcl-eval mpmath       (its other requirements pin an old numpy)

The eight classes of the multi-turn categories run in this process, as they do there: they hold
their state in memory and reach nothing else. Their answers become text by the authors' rule
(multi_turn_utils.execute_multi_turn_func_call), so that they can be compared with their truths.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import pathlib
import random
from collections.abc import Mapping
from typing import Any

from envs.gem import ToolCall
from envs.worlds.published import FormatError, read_lines
from envs.worlds.tools import Database, Tool

INSTALL = "pip install --no-deps bfcl-eval mpmath"
CATEGORIES = (
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
)
CLASSES = (
    "GorillaFileSystem",
    "MathAPI",
    "MessageAPI",
    "TicketAPI",
    "TradingBot",
    "TravelAPI",
    "TwitterAPI",
    "VehicleControlAPI",
)
FAILED = "Error during execution: "
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def is_installed() -> bool:
    """Return whether the authors' package can be imported."""
    return importlib.util.find_spec("bfcl_eval") is not None


def files_of(name: str) -> list[pathlib.Path]:
    """Return the package's files of a category, or of all for "multi_turn".

    Raises:
      FormatError: there is no such category, or the package is not installed.
    """
    names = [one for one in CATEGORIES if name in ("multi_turn", one)]
    if not names:
        raise FormatError(
            f"bfcl:{name} is neither a file nor one of multi_turn, {', '.join(CATEGORIES)}"
        )
    _need_package(f"bfcl:{name}")
    return [_package() / "data" / f"BFCL_v4_{one}.json" for one in names]


def more_functions() -> str:
    """Return what the authors' user says when functions have been added."""
    prompts = importlib.import_module("bfcl_eval.constants.default_prompts")
    return prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC


def make_state(name: str, config: Database, long_context: bool) -> Any:
    """Return an object of a class in the state that a file's initial_config describes.

    Raises:
      FormatError: the class does not take it.
    """
    made = _class(name)()
    if hasattr(made, "_load_scenario"):
        try:
            made._load_scenario(copy.deepcopy(config), long_context=long_context)
        except Exception as error:  # whatever the authors' code meets in a file
            raise FormatError(
                f"{name} does not take its initial_config: {type(error).__name__}: {error}"
            ) from error
    return made


@functools.cache
def tools_of(name: str) -> tuple[Tool, ...]:
    """Return the tools of a class, with the authors' descriptions.

    Raises:
      FormatError: the package is not installed.
    """
    _need_package(name)
    config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    file = config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]
    path = _package() / "data" / "multi_turn_func_doc" / file
    return tuple(_tool(name, document) for _, document in read_lines(path))


def random_call(rng: random.Random, name: str) -> ToolCall:
    """Return a call of one of the class's functions with arguments, of the right types."""
    tool = rng.choice([tool for tool in tools_of(name) if set(tool.parameters) - {*tool.optional}])
    some = {"string": "x", "array": ["x"], "object": {}, "boolean": True}
    arguments = {
        key: some.get(tool.parameters[key]["type"], rng.randrange(1, 100))
        for key in tool.parameters
        if key not in tool.optional
    }
    return ToolCall(tool.name, arguments)


def _need_package(what: str) -> None:
    if not is_installed():
        raise FormatError(f"{what} needs the code of BFCL's authors: {INSTALL}")


def _package() -> pathlib.Path:
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or spec.origin is None:
        raise FormatError(f"bfcl_eval is not a package with files: {INSTALL}")
    return pathlib.Path(spec.origin).parent


def _class(name: str) -> Any:
    config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    return getattr(importlib.import_module(config.CLASS_FILE_PATH_MAPPING[name]), name)


def _tool(class_name: str, document: Mapping[str, Any]) -> Tool:
    name = document["name"]
    schemas = {key: _schema(one) for key, one in document["parameters"]["properties"].items()}
    signature = inspect.signature(getattr(_class(class_name), name))
    # In the order of the method, which truths with arguments by position follow.
    order = [key for key in signature.parameters if key in schemas]
    required = document["parameters"].get("required", ())
    return AuthorsTool(
        name,
        document["description"],
        {key: schemas[key] for key in [*order, *(key for key in schemas if key not in order)]},
        functools.partial(_run, name),
        optional=tuple(key for key in schemas if key not in required),
    )


def _schema(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's JSON schema, with the type names of JSON."""
    schema = dict(document)
    schema["type"] = _TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        schema["properties"] = {key: _schema(one) for key, one in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _schema(schema["items"])
    return schema


@dataclasses.dataclass(frozen=True)
class AuthorsTool(Tool):
    """A method of the authors'. It checks its arguments itself, and its errors are answers."""

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments; texts are read as JSON where the schema wants another type."""
        return {name: self._read(name, value) for name, value in arguments.items()}

    def _read(self, name: str, value: Any) -> Any:
        kind = self.parameters.get(name, {}).get("type", "string")
        if not isinstance(value, str) or kind == "string":
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value


def _run(name: str, made: Any, /, **arguments: Any) -> str:
    try:
        answer = getattr(made, name)(**copy.deepcopy(arguments))
    except Exception as error:  # as the authors' own runner
        return f"{FAILED}{error}"
    if isinstance(answer, str):
        return answer
    if isinstance(answer, dict):
        try:
            return json.dumps(answer)
        except (TypeError, ValueError, RecursionError):
            return str(answer)
    return str(answer)
