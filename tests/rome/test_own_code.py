"""Own code is found by name wherever a user keeps it, or refused in one clear line."""

import dataclasses

import pytest

from rome import own_code
from rome.own_code import OwnCodeError, build, declared_keys, find, load, require_signature

SOURCE = """
import dataclasses
import neighbour

def plain(a, b):
    return a + b + neighbour.ONE

@dataclasses.dataclass(frozen=True)
class Keyed:
    weight: float = 0.5
    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must be 0 or more")
    def __call__(self, a, b):
        return self.weight * (a + b)

@dataclasses.dataclass
class Needs:
    weight: float
    def __call__(self, a, b): ...

class Plain:
    def __call__(self, a, b): ...

@dataclasses.dataclass
class Silent:
    weight: float = 1.0

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of an experiment, with a file of own code and a neighbour of it."""
    monkeypatch.setattr(own_code, "_folders", [])
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir("/")
    own_code.search_in(tmp_path)
    return tmp_path


def test_a_file_is_found_in_the_experiments_folder_by_its_path_and_as_a_module(folder):
    for where in ("mine.py", f"{folder}/mine.py", "mine"):
        assert load(f"{where}:plain")(1, 2) == 4
    assert load("mine.py:plain") is load(f"{folder}/mine.py:plain")  # imported once


def test_a_path_that_is_two_files_is_refused_and_not_guessed(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "mine.py").write_text("def plain(a, b): ...\n")
    own_code.search_in(other)
    with pytest.raises(OwnCodeError, match=r"mine.py is .* and .*Give the whole path"):
        load("mine.py:plain")


def test_an_entry_of_the_table_needs_no_import():
    assert find("ipa", {"ipa": 1}) == 1
    with pytest.raises(OwnCodeError, match=r"'ipo' is unknown. Choose one of ipa, or own code"):
        find("ipo", {"ipa": 1})


def test_fields_of_a_dataclass_are_its_keys_and_it_may_refuse_values(folder):
    code = load("mine.py:Keyed")
    assert declared_keys(code) == {"weight": 0.5} and declared_keys(load("mine.py:plain")) == {}
    assert build(code, {"weight": 2.0})(1, 2) == 6.0 and build(code, {})(1, 2) == 1.5
    with pytest.raises(OwnCodeError, match=r"Keyed: weight=-1.0 must be 0 or more"):
        build(code, {"weight": -1.0})


@pytest.mark.parametrize(
    "name, message",
    [
        ("mine.py:plane", "defines no 'plane'. Did you mean 'plain'"),
        ("mine.py:", "names no own code"),
        (":plain", "names no own code"),
        ("absent.py:plain", "there is no file absent.py; looked for /absent.py, "),
        ("absent.module:plain", "there is no module absent.module"),
        ("broken.py:f", r"importing .*broken.py failed: NameError: .*\(broken.py, line 2\)"),
        ("syntax.py:f", "importing .*syntax.py failed: SyntaxError"),
        ("needs.py:f", "importing .*needs.py failed: ModuleNotFoundError: .*'no_such_thing'"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_reason(folder, name, message):
    (folder / "broken.py").write_text("\nx = undefined\n")
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "needs.py").write_text("import no_such_thing\n")
    with pytest.raises(OwnCodeError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("Needs", "field 'weight' of Needs has no default"),
        ("Plain", "Plain is no dataclass"),
    ],
)
def test_a_class_whose_keys_have_no_defaults_is_refused(folder, name, message):
    with pytest.raises(OwnCodeError, match=message):
        declared_keys(load(f"mine.py:{name}"))


@pytest.mark.parametrize("name", ["plain", "Keyed"])
def test_the_signature_must_fit(folder, name):
    require_signature(load(f"mine.py:{name}"), ("a", "b"))
    with pytest.raises(OwnCodeError, match=r"cannot be called with .a, b, c."):
        require_signature(load(f"mine.py:{name}"), ("a", "b", "c"))


@pytest.mark.parametrize("name", ["number", "Silent"])
def test_what_cannot_be_called_is_refused(folder, name):
    with pytest.raises(OwnCodeError, match=r"cannot be called. Give a function"):
        require_signature(load(f"mine.py:{name}"), ("a", "b"))


def test_a_changed_file_has_another_digest(folder):
    before = own_code.digest(["mine.py:plain", "ipa"])
    (folder / "mine.py").write_text(SOURCE + "\n")
    assert own_code.digest(["mine.py:plain"]) != before
    assert dataclasses.is_dataclass(load("mine.py:Keyed"))
