"""The library of the C++ forms is found, or built, wherever an engine may start."""

import _ctypes
import dataclasses
import threading

import pytest

from rome.model.config import PRESETS
from rome.model.ops import native
from rome.model.ops.kernels import choose_serving_kernels

SOME_LIBRARY = _ctypes.__file__  # what the compilers of these tests make


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """Install scripts as compilers, by name; each writes its calls to a log, which is returned."""
    monkeypatch.setattr(native, "CACHE", tmp_path / "cache" / "native")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(native, "COMPILERS", ("first", "second"))

    def install(**bodies):
        for name, body in bodies.items():
            script = folder / name
            log = f'echo "$0 $1" >> {tmp_path}/log\n'
            script.write_text(f"#!/bin/sh\n{log}for last; do :; done\n{body}\n")
            script.chmod(0o755)

    install.log = tmp_path / "log"
    return install


MAKES = f'cp {SOME_LIBRARY} "$last"'


def kept():
    (library,) = native.CACHE.glob("*.so")
    return library


def test_a_library_is_built_once_and_then_found_without_a_compiler(compilers, monkeypatch):
    compilers(first=MAKES)
    native._load()
    monkeypatch.setattr(native, "COMPILERS", ())
    native._load()
    assert len(compilers.log.read_text().splitlines()) == 1
    assert list(native.CACHE.iterdir()) == [kept()]


@pytest.mark.parametrize("found", [b"", b"\x7fELF", b"a library of another system"])
def test_a_library_that_cannot_be_loaded_is_built_again(compilers, found):
    compilers(first=MAKES)
    native.CACHE.mkdir(parents=True)
    native.CACHE.joinpath(f"{native._name()}.so").write_bytes(found)
    native._load()
    assert kept().stat().st_size > 1000


def test_a_cache_that_cannot_be_written_keeps_no_engine_from_its_forms(compilers, monkeypatch):
    compilers(first=MAKES)
    native.CACHE.parent.write_text("a file where a folder would be")
    assert native._load()._name.endswith("native.so")


def test_what_a_compiler_does_not_know_or_cannot_do_the_next_attempt_does(compilers):
    compilers(first="echo unknown >&2; exit 1", second=f'[ "$1" = -mcpu=native ] && {MAKES}')
    native._load()
    asked = [line.rpartition("/")[2] for line in compilers.log.read_text().splitlines()]
    assert asked == [
        "first -march=native",
        "first -mcpu=native",
        "second -march=native",
        "second -mcpu=native",
    ]


def test_why_none_can_is_said_for_each(compilers):
    compilers(first="echo too old >&2; exit 1", second="echo no memory >&2; exit 1")
    with pytest.raises(native.NativeError, match=r"first .*too old.*second .*no memory"):
        native._load()


def test_engines_that_start_at_once_build_it_once(compilers, monkeypatch):
    compilers(first=f"sleep 0.2; {MAKES}")
    monkeypatch.setattr(native, "_register", native.functools.cache(native._load))
    threads = [threading.Thread(target=native.reason_missing) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilers.log.read_text().splitlines()) == 1


def test_a_processor_is_known_by_what_chooses_its_instructions():
    assert len(native._processor().split()) > 3


def test_a_model_that_the_forms_do_not_take_is_told_what_it_gives_up(caplog):
    odd = dataclasses.replace(PRESETS["tiny"], head_dim=24)
    assert choose_serving_kernels("cpu", odd).attention == "gather"
    assert "--call_tokens" in caplog.text and "24" in caplog.text
