"""The documents name only what exists: files, anchors, modules, flags, configuration keys."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from docs.figures import configuration
from tests.docs.pages import PAGES, ROOT, blocks, commands, name_of

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CONFIG_KEY = re.compile(r"--config\.([a-z_.0-9]+)|`config\.([a-z_.0-9]+)(?:=[^`]*)?`")
MODULES = sorted(
    {words[2] for path in PAGES for words in commands(path) if words[2].startswith("launch.")}
    - {"launch.X", "launch.pod"}  # the latter has a --help for each of its subcommands
)
pages = pytest.mark.parametrize("path", PAGES, ids=name_of)


def anchors(path: pathlib.Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and mkdocs make them."""
    found = set()
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            title = line.lstrip("#").strip().lower().replace("`", "")
            found.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return found


def leads(page: pathlib.Path, target: str) -> bool:
    """Whether a link leads to a file and, in a Markdown file, to a heading. URLs are not tried."""
    if "://" in target or target.startswith("mailto:"):
        return True
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    is_heading = not anchor or file.suffix != ".md" or anchor in anchors(file)
    return file.exists() and is_heading


@pages
def test_every_link_leads_somewhere(path):
    broken = [target for target in LINK.findall(path.read_text()) if not leads(path, target)]
    assert not broken


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """Return the names of the flags that a module and what it imports from launch/ define."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    tree = ast.parse(pathlib.Path(spec.origin).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            names.update(_flags_of_call(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("launch", "rome")):
            names.update(_flags_of_import(node.module))
        if isinstance(node, ast.ImportFrom) and node.module == "launch":
            names.update(*(_flags_of_import(f"launch.{alias.name}") for alias in node.names))
    return frozenset(names)


def _flags_of_call(node: ast.Call) -> set[str]:
    """Return the flags that a call of argparse or absl defines."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    first = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    texts = [value for value in first if isinstance(value, str)]
    if called.startswith("DEFINE_"):
        return set(texts[:1])
    return {text[2:] for text in texts if text.startswith("--")}


def _flags_of_import(module: str) -> set[str]:
    """Return the flags that an imported module defines itself."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return set()
    text = pathlib.Path(spec.origin).read_text()
    if "DEFINE_" not in text and "add_argument" not in text:
        return set()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return set().union(*map(_flags_of_call, calls))


def flags_in(words: list[str]) -> list[str]:
    """Return the names of the flags of a command, without those behind `--` and `--config...`."""
    own = words[: words.index("--")] if "--" in words else words
    flags = [word[2:].split("=")[0] for word in own if word.startswith("--")]
    return [flag for flag in flags if not flag.startswith("config.") and flag != "config"]


@pages
def test_every_command_names_a_module_and_flags_that_it_has(path):
    unknown = []
    for words in commands(path):
        if re.fullmatch(r"(launch|benchmarks|docs|examples)\.[a-z_.0-9]+", words[2]):
            known = flags_of(words[2])
            unknown += [f"{words[2]} --{flag}" for flag in flags_in(words[3:]) if flag not in known]
    assert not unknown


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_a_command_explains_the_flags_that_the_documents_use(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    used = {
        flag
        for path in PAGES
        for words in commands(path)
        if words[2] == module
        for flag in flags_in(words[3:])
    }
    text = done.stdout + done.stderr
    missing = [flag for flag in used if f"--{flag}" not in text and f"--[no]{flag}" not in text]
    assert not missing, text[-2000:]


@functools.cache
def known_keys() -> dict[str, str]:
    """Return type names of all configuration keys and of their blocks, by dotted name."""
    keys = {}
    for experiment in configuration.EXPERIMENTS:
        for key, value in configuration.load(experiment, "tiny").items():
            keys[key] = type(value).__name__
            keys[key.rpartition(".")[0]] = "block"
    return keys


@pages
def test_every_configuration_key_exists(path):
    text = path.read_text()
    named = {first or second for first, second in CONFIG_KEY.findall(text)}
    named = {key.rstrip(".") for key in named if key.partition(".")[0] != "own"}  # own code's
    unknown = named - known_keys().keys() - {"key", "json"}
    assert not unknown


def test_the_page_of_configuration_keys_is_current():
    assert configuration.PAGE.read_text() == configuration.make_page(), (
        "run python -m docs.figures.configuration"
    )


def test_every_configuration_key_is_explained_somewhere():
    unexplained = [
        key
        for key in known_keys()
        if known_keys()[key] != "block"
        and not configuration.describe(key, configuration.EXPERIMENTS)
    ]
    assert not unexplained


def test_the_readme_can_be_read_in_five_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1100


def test_every_picture_is_shown_and_drawn_by_a_script():
    text = "".join(path.read_text() for path in PAGES)
    scripts = "".join(path.read_text() for path in (ROOT / "docs" / "figures").glob("*.py"))
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.name in text, f"{picture.name} is on no page"
        assert picture.name in scripts, f"{picture.name} is drawn by no script"


@pages
def test_python_blocks_are_python(path):
    for block in blocks(path, "python"):
        compile(block, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pages
def test_every_name_of_the_reference_exists(path):
    for name in re.findall(r"^::: ([\w.]+)$", path.read_text(), re.MULTILINE):
        assert is_importable(name), name


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, member = name.rpartition(".")
        return hasattr(importlib.import_module(module), member)
    return True
