"""One engine for all tests of its protocol: started once, its compilations counted."""

import pytest

from rome.model.tokenizer import TINY, Tokenizer
from tests.rome.serve.talk import compilations
from tests.rome.serve.tiny import Oracle, make_checkpoint, serve


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "a")


@pytest.fixture(scope="package")
def other_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "b", seed=1)


@pytest.fixture(scope="package")
def server(checkpoint, tmp_path_factory):
    with serve(
        checkpoint,
        tmp_path_factory.mktemp("log") / "serve.log",
        environment={"JAX_LOG_COMPILES": "1"},
    ) as running:
        running.compilations = compilations(running)
        yield running


@pytest.fixture(scope="package")
def oracle(checkpoint):
    return Oracle.load(checkpoint)


@pytest.fixture(scope="package")
def tokenizer():
    return Tokenizer.load(TINY)
