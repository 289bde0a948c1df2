"""SGLang's own request classes parse every body that the client sends.

SGLANG_PYTHON=DIR/bin/python[:DIR/bin/python...] names environments with `pip install --no-deps
sglang==VERSION` and msgspec, pydantic, orjson, numpy.
"""

import asyncio
import json
import os
import pathlib
import subprocess
from unittest import mock

import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling

PYTHONS = [name for name in os.environ.get("SGLANG_PYTHON", "").split(":") if name]

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHONS,
        reason=(
            "SGLANG_PYTHON is not set: pip install --no-deps sglang into an environment of its own"
            " and name its interpreter"
        ),
    ),
]


class Recorder(Engine):
    """Keeps what it would send, and answers as a server that has done it."""

    def __init__(self):
        super().__init__("http://nowhere:1")
        self.sent = []
        self._connection.post = self.record
        self._connection.post_for_any = self.record

    async def record(self, route, body):
        self.sent.append((route, body))
        if body.get("logprob_start_len") == 0:
            return {
                "output_ids": [],
                "meta_info": {
                    "input_token_logprobs": [[0.0, one, None] for one in body["input_ids"]]
                },
            }
        if route == "/generate":
            return {
                "output_ids": [4],
                "meta_info": {
                    "finish_reason": {"type": "length"},
                    "output_token_logprobs": [[-1.0, 4, None]],
                    "weight_version": "3",
                },
            }
        return {"success": True}


async def everything():
    engine = Recorder()
    await engine.generate([1, 2, 3], Sampling(5), 10)
    engine.prove(3)
    await engine.generate(
        [1, 2, 3],
        Sampling(
            5,
            temperature=0.7,
            top_p=0.9,
            top_k=20,
            min_p=0.1,
            stop=("a",),
            stop_token_ids=(7,),
            seed=2**62,
        ),
        10,
    )
    with mock.patch("rome.engine.client.parse_routes"):  # the recorder answers without routes
        await engine.generate([1, 2, 3], Sampling(5, temperature=0.0, routes_from=2), 10)
    await engine.score([1, 2, 3])
    for mode in ("abort", "retract", "in_place"):
        await engine.pause(mode)
    await engine.update_weights("/weights/step_000003", 3)
    await engine.update_weights("/weights/step_000003", 3, flush=False)
    await engine.resume()
    await engine.release_memory()
    await engine.resume_memory(("weights",))
    await engine.checksum()
    return engine.sent


@pytest.mark.parametrize("python", PYTHONS)
def test_sglangs_own_classes_understand_every_body(python):
    sent = asyncio.run(everything())
    done = subprocess.run(
        [python, pathlib.Path(__file__).with_name("parse_by_sglang.py")],
        input=json.dumps(sent),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert [result["route"] for result in results] == [route for route, _ in sent]
    absent = {result["route"] for result in results if "absent" in result}
    assert absent <= {"/weights_checker"}  # 0.5.9 has none, and is not asked for it
    for (route, body), result in zip(sent, results, strict=True):
        if route in absent:
            continue
        assert result["unknown"] == []
        for name, value in body.items():
            if name not in (
                "sampling_params",
                "logprob_start_len",
                "return_logprob",
            ):  # a single request's are put into lists by some versions
                assert result["values"][name] == value, (route, name)
        if route == "/generate":
            assert result["contract"] is None and result["values"]["is_single"] is True
            params = body["sampling_params"]
            assert result["sampling"]["max_new_tokens"] == params["max_new_tokens"] and result[
                "sampling"
            ]["sampling_seed"] == params.get("sampling_seed")
            assert (
                result["sampling"]["no_stop_trim"] is True
                and result["sampling"]["top_p"] == params["top_p"]
            )
