"""The real sglang-router before the embedded engine: what our client sends passes through it, and
weights go to the workers behind its back.

pip install sglang-router into an environment of its own, and name its interpreter:
SGLANG_ROUTER_PYTHON=DIR/bin/python.
"""

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from rome.engine.client import Engine
from rome.engine.completion import Sampling
from rome.engine.pool import EnginePool
from rome.engine.publish import publish_weights, write_checkpoint
from tests.rome.serve.tiny import Oracle, make_checkpoint, make_config, make_params, serve

PYTHON = os.environ.get("SGLANG_ROUTER_PYTHON", "")
PROBE = list(range(20, 50))

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason=(
            "SGLANG_ROUTER_PYTHON is not set: pip install sglang-router into an environment of its"
            " own and name its interpreter"
        ),
    ),
]


@contextlib.contextmanager
def router(workers, log):
    with socket.socket() as probe, socket.socket() as metrics:
        probe.bind(("127.0.0.1", 0)), metrics.bind(("127.0.0.1", 0))
        port, metrics_port = probe.getsockname()[1], metrics.getsockname()[1]
    command = [
        PYTHON,
        "-m",
        "sglang_router.launch_router",
        "--worker-urls",
        *workers,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        "round_robin",
        "--prometheus-port",
        str(metrics_port),
    ]
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        ends, url = time.monotonic() + 90, f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if urllib.request.urlopen(url + "/readiness", timeout=5).status == 200:
                    break
            assert process.poll() is None and time.monotonic() < ends, pathlib.Path(
                log
            ).read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_completions_through_the_router_are_the_engines_own_across_a_publication(tmp_path):
    start = make_checkpoint(tmp_path / "start", endless=True)
    with (
        serve(start, tmp_path / "a.log") as a,
        serve(start, tmp_path / "b.log") as b,
        router([a.url, b.url], tmp_path / "router.log") as url,
    ):

        async def run():
            async with (
                Engine(url, model=make_config()) as front,
                EnginePool([Engine(a.url), Engine(b.url)]) as workers,
            ):
                assert await front.health() == "well"
                for version in (1, 2):
                    params = make_params(version)
                    path = write_checkpoint(params, make_config(), tmp_path / "weights", version)
                    logprobs = [0.0, *Oracle(make_config(), params).logprobs(PROBE)]
                    running = asyncio.gather(
                        *(front.generate(PROBE, Sampling(300, seed=i), 120) for i in range(6))
                    )
                    await asyncio.sleep(0.3)
                    assert (
                        await publish_weights(path, version, workers, PROBE, logprobs)
                    ).engines == 2  # the router has no fan-out for this
                    for completion in await running:
                        assert len(completion.output_ids) == 300 and completion.versions[-1][0] in (
                            version - 1,
                            version,
                        )
                    direct = await workers.generate(
                        PROBE, Sampling(20, seed=5, routes_from=None), 60
                    )
                    routed = await asyncio.gather(
                        *(front.generate(PROBE, Sampling(20, seed=5), 60) for _ in range(4))
                    )
                    assert all(
                        one.output_ids == direct.output_ids and one.versions == [(version, 0, 20)]
                        for one in routed
                    )

        asyncio.run(asyncio.wait_for(run(), 200))
