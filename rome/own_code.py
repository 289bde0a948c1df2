"""Find a user's own code by name, as a config names it, and the config keys that it declares.

    package.module:name        a module that Python finds
    path/to/file.py:name       a file; a relative path is looked up in the working directory and in
                               the folders of the experiments that were loaded

Own code is a function, or a class with `__call__` that is a dataclass: its fields are config keys,
their defaults are the keys' defaults, and a `__post_init__` may refuse values with a ValueError.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

FORMS = "package.module:name or path/to/file.py:name"
KEY_TYPES = (bool, int, float, str)
MAX_TEXT = 200  # characters of an error of own code
_INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "purelib")]
_NOT_OWN = (str(pathlib.Path(__file__).parent), *_INSTALLED, "<")  # starts of files' names

_folders: list[pathlib.Path] = []  # of experiments, in the order in which they were loaded


class OwnCodeError(ValueError):
    """Own code that cannot be used: the message says which, why and what to do."""


def search_in(folder: pathlib.Path) -> None:
    """Look up relative paths and modules in this folder too, the folder of an experiment."""
    folder = folder.resolve()
    if folder in _folders:
        return
    _folders.append(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that it hides nothing


def is_own(name: Any) -> bool:
    """Return whether a config value names own code, and not an entry of a table of ours."""
    return isinstance(name, str) and ":" in name


def find(name: str, table: Mapping[str, Any]) -> Any:
    """Return what a name stands for: an entry of the table, or own code.

    Raises:
      OwnCodeError: it is neither.
    """
    if name in table:
        return table[name]
    if is_own(name):
        return load(name)
    known = f"one of {', '.join(table)}, or " if table else ""
    raise OwnCodeError(f"{name!r} is unknown. Choose {known}own code as {FORMS}")


def load(name: str) -> Any:
    """Import own code and return the object of that name.

    Raises:
      OwnCodeError: there is no such file, module or name, or importing it fails.
    """
    where, _, attribute = name.rpartition(":")
    module = _module_of(name)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), 1)
        remedy = f"Did you mean {near[0]!r}?" if near else "Define it there"
        raise OwnCodeError(f"{where} defines no {attribute!r}. {remedy}")
    return getattr(module, attribute)


def declared_keys(code: Any) -> dict[str, Any]:
    """Return the config keys that own code declares, with their defaults; {} for a function.

    Raises:
      OwnCodeError: a class declares what cannot be config keys.
    """
    if not inspect.isclass(code):
        return {}
    if not dataclasses.is_dataclass(code):
        raise OwnCodeError(
            f"the class {code.__name__} is no dataclass. Decorate it with"
            " @dataclasses.dataclass(frozen=True): its fields are the config keys"
        )
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(code):
        if not isinstance(field.default, KEY_TYPES):
            raise OwnCodeError(
                f"the field {field.name!r} of {code.__name__} has no default that is True or False,"
                " a number or a text. Give it one: it is a config key"
            )
        keys[field.name] = field.default
    return keys


def build(code: Any, keys: Mapping[str, Any]) -> Callable[..., Any]:
    """Return own code ready to be called: a function as it is, a class with its keys set.

    Raises:
      OwnCodeError: the class refuses a value.
    """
    if not inspect.isclass(code):
        return code
    try:
        return code(**keys)
    except (TypeError, ValueError) as error:
        raise OwnCodeError(f"{code.__name__}: {error}") from None


def require_signature(code: Any, parameters: Iterable[str]) -> None:
    """Check that own code can be called with these arguments, by position.

    Raises:
      OwnCodeError: it cannot be called at all, or takes others.
    """
    if not _can_be_called(code):
        raise OwnCodeError(
            f"{getattr(code, '__name__', code)!r} cannot be called. Give a function, or a dataclass"
            " with __call__"
        )
    parameters = tuple(parameters)
    called = code.__call__ if inspect.isclass(code) else code
    given = ("self", *parameters) if inspect.isclass(code) else parameters
    signature = inspect.signature(called)
    try:
        signature.bind(*given)
    except TypeError as error:
        name = getattr(code, "__name__", type(code).__name__)
        raise OwnCodeError(
            f"{name}{signature} cannot be called with ({', '.join(parameters)}): {error}"
        ) from None


def _can_be_called(code: Any) -> bool:
    if not inspect.isclass(code):
        return callable(code)
    return any("__call__" in vars(base) for base in inspect.getmro(code)[:-1])  # not of `type`


def digest(names: Iterable[str]) -> str:
    """Return a hash of the files that own code is imported from, for hosts to compare."""
    content = hashlib.sha256()
    for name in sorted(name for name in names if is_own(name)):
        file = _module_of(name).__file__
        content.update(name.encode())
        content.update(pathlib.Path(file).read_bytes() if file else b"")
    return content.hexdigest()[:16]


def _module_of(name: str) -> ModuleType:
    where, _, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise OwnCodeError(f"{name!r} names no own code. Give {FORMS}")
    return _load_file(_find_file(where)) if where.endswith(".py") else _load_module(where)


def _find_file(where: str) -> pathlib.Path:
    path = pathlib.Path(where).expanduser()
    folders = [pathlib.Path.cwd(), *_folders]
    candidates = [path] if path.is_absolute() else [folder / path for folder in folders]
    found = list(dict.fromkeys(one.resolve() for one in candidates if one.is_file()))
    if not found:
        looked = ", ".join(str(one) for one in dict.fromkeys(candidates))
        raise OwnCodeError(f"there is no file {where}; looked for {looked}")
    if len(found) > 1:
        raise OwnCodeError(
            f"{where} is {' and '.join(map(str, found))}. Give the whole path of one of them"
        )
    return found[0]


def _load_file(file: pathlib.Path) -> ModuleType:
    """Import a file once; a name made of its path keeps files of equal names apart."""
    name = f"own_code_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is imported
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # for its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise OwnCodeError(f"importing {file} failed: {describe(error)}") from error
    return module


def _load_module(where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and where.startswith(error.name or "-")
        if is_missing:
            raise OwnCodeError(
                f"there is no module {where}. Install it, or give a file as path/to/file.py:name"
            ) from None
        raise OwnCodeError(f"importing {where} failed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Return an error of own code in one line, with the place in it that it came from."""
    text = " ".join(str(error).split())
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "..."
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN)]
    place = f" ({pathlib.Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{place}"
