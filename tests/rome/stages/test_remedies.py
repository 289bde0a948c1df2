"""Every key that a message or a page names is one, and every value that it advises is accepted."""

import ast
import re

import pytest

from rome.losses import PUBLISHED
from rome.stages.config import check_config, load_config
from rome.train.workdir import flatten
from tests.paths import ROOT

GAP = "\N{WHITE SQUARE}"  # stands for what a message fills in
FLAG = re.compile(rf"--config\.([a-z_][a-z_0-9.{GAP}]*)(?:=([^\s`'\"),;]+))?")
ADVICE = re.compile(rf"\b(?:[Ss]et|[Oo]r|[Ww]ith|and) ([a-z_][a-z_0-9.]*)=([^\s`'\"),;{GAP}]+)")
MAY_ADVISE = re.compile(r"--config\.|\"[^\"\n]*\b[a-z_]+=[\w-][^\"\n]*\"")
GIVEN_WITH = {  # what the same page says to give besides
    "eval_tasks=0": {"trajectories": "DIR", "until_success": 0.0},
    "max_context=4096": {"row_length": 4096},
    "max_context=8192": {"row_length": 8192},
    "rows=1": {"rows_per_microbatch": 1},
    "sandbox.backend=docker": {"sandbox.image": "python:3.12"},
    "max_context=320": {"row_length": 320},
    "max_context=512": {"row_length": 512},
    "feedback=decisions.jsonl": {"select": "preferred"},
    "lora.publish=adapter": {"lora.rank": 8},
    "sandbox.backend=remote": {"sandbox.url": "http://127.0.0.1:9"},
}
FILES: dict[str, str] = {}
EXAMPLES = {"key", "KEY"}  # of --config.key=value


def texts():
    """Yield (place, text) of every string of the product and every page of the documents."""
    for top in ("rome", "launch", "experiments"):
        for path in sorted((ROOT / top).rglob("*.py")):
            source = path.read_text()
            if not MAY_ADVISE.search(source):  # most files: not worth the time to parse them
                continue
            tree = ast.parse(source)
            inner = {
                id(part)
                for node in ast.walk(tree)
                if isinstance(node, ast.JoinedStr)
                for part in node.values
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", "".join(parts)
                elif isinstance(node, ast.Constant) and id(node) not in inner:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", str(node.value)
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line


@pytest.fixture(scope="module")
def configs():
    """The default of every experiment, and of each loss that reads keys of its own."""
    found = [load_config(f"experiments/{name}.py", "tiny") for name in ("ipa", "sft", "cpt")]
    for loss in PUBLISHED:
        found.append(load_config("experiments/ipa.py", "tiny"))
        found[-1].loss = loss
    return found


def is_key(name, configs):
    """Return whether a name, with gaps for any text, is a key or a block of an experiment."""
    form = re.compile(re.escape(name).replace(GAP, "[a-z_.]+"))
    keys = {key for config in configs for key in flatten(config.to_dict())}
    blocks = {key.rpartition(".")[0] for key in keys}
    return any(form.fullmatch(known) for known in keys | blocks)


def is_accepted(name, text, configs):
    """Return whether an experiment that has the key takes the value."""
    for config in configs:
        default = flatten(config.to_dict()).get(name)
        if default is None:
            continue
        changed = config.copy_and_resolve_references()
        kind = type(default)
        try:
            value = {"True": True, "False": False}[text] if kind is bool else kind(text)
            value = FILES.get(text, value)
            together = GIVEN_WITH.get(f"{name}={text}", {})
            changed.update_from_flattened_dict({name: value, **together})
            check_config(changed)
            return True
        except (ValueError, KeyError):
            continue
    return False


@pytest.mark.long
def test_the_keys_and_values_that_texts_advise_are_accepted(configs, monkeypatch, tmp_path):
    monkeypatch.setenv("ROCK_TOKEN", "x")
    decisions = tmp_path / "decisions.jsonl"  # stands for a file that the reader has
    decisions.touch()
    monkeypatch.setitem(FILES, "decisions.jsonl", str(decisions))
    found, wrong = 0, []
    for place, text in texts():
        for name, value in FLAG.findall(text):
            name, value = name.rstrip("."), value.rstrip(".:")
            if name in EXAMPLES or name.startswith("own."):  # keys of own code
                continue
            found += 1
            is_advice = value and GAP not in name + value and not is_example(value)
            if not is_key(name, configs):
                wrong.append(f"{place}: {name} is no key")
            elif is_advice and not is_accepted(name, value, configs):
                wrong.append(f"{place}: {name}={value} is refused")
        for name, value in ADVICE.findall(text):
            if any(name in flatten(config.to_dict()) for config in configs):
                found += 1
                if not is_accepted(name, value.rstrip("."), configs):
                    wrong.append(f"{place}: {name}={value} is refused")
    assert found > 40
    assert not wrong, "\n".join(wrong)


def is_example(value):
    """Return whether a value stands for another one, as DIR, URL[,URL...] and mine.py:Name do."""
    if value.startswith("mine.py:"):  # a file that the reader writes
        return True
    return re.fullmatch(r"[A-Z_]+.*", value) is not None and value not in ("True", "False")


@pytest.mark.parametrize(
    "text, is_right",
    [
        ("Set --config.mesh.fsdp=-1 (all", True),
        ("Set --config.mesh.fsdp=-2", False),
        ("--config.mesh.fsbp=1", False),
        ("set rollout.async_ratio=0.", True),
    ],
)
def test_the_check_would_find_a_remedy_that_is_refused(configs, text, is_right):
    name, value = (FLAG.search(text) or ADVICE.search(text)).groups()
    value = value.rstrip(".")
    assert (is_key(name, configs) and is_accepted(name, value, configs)) is is_right
