"""One engine for all tests of its protocol: started once, its compilations counted."""

import json

import pytest

from rome.model.tokenizer import TINY, Tokenizer
from tests.rome.serve.talk import compilations
from tests.rome.serve.tiny import Oracle, make_checkpoint, make_config, serve


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("model") / "a")
    config = make_config()
    both = [config.eos_token_id, config.pad_token_id]  # as Qwen's checkpoints have it
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": both}))
    return directory


@pytest.fixture(scope="package")
def other_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "b", seed=1)


@pytest.fixture(scope="package")
def server(checkpoint, tmp_path_factory):
    with serve(
        checkpoint,
        tmp_path_factory.mktemp("log") / "serve.log",
        # more, and answers end before a conversation gets a turn to disturb them
        "--decode_steps",
        "2",
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
