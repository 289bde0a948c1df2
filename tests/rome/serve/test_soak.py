"""Ten thousand requests of every kind to a real engine, a thousand at once, with clients that go,
aborts, pauses and new weights: nothing fails, and neither pages nor memory leak.
"""

import asyncio
import json
import pathlib
import random
import re
import shutil

import aiohttp
import pytest

from tests.rome.serve.talk import Http, talk
from tests.rome.serve.tiny import make_checkpoint, make_config, serve

REQUESTS, AT_ONCE = 10_000, 1_000
MAX_GROWTH = 64 << 20
V = make_config().vocab_size

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def memory_of(server):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10


def body_of(rng, number):
    """A request of any kind, short: what is tested is what surrounds it."""
    shared = [5, 6, 7] * 8
    ids = shared[: rng.randrange(1, 24)] + [rng.randrange(V) for _ in range(rng.randrange(30))]
    sampling = {"max_new_tokens": rng.randrange(12), "temperature": rng.choice([0, 0.7, 1])}
    sampling |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 4}, {"stop": ["e"]}, {"n": 2}])
    body = {"input_ids": ids, "sampling_params": sampling, "rid": f"{number:06x}"}
    body |= {"return_logprob": rng.random() < 0.5, "stream": rng.random() < 0.3}
    body |= {"return_routed_experts": rng.random() < 0.2, "priority": rng.randrange(3)}
    if rng.random() < 0.1:
        body |= {"return_logprob": True, "logprob_start_len": 0}
    if rng.random() < 0.02:
        body["sampling_params"] = {"temperature": -1}
    return body


async def ask(http, body, patience):
    """Return the status; None where the client has left before the end."""
    try:
        async with asyncio.timeout(patience):
            async with http.session.post(http.url + "/generate", json=body) as response:
                text = await response.text()
    except TimeoutError:
        return None
    if response.status == 200 and body.get("stream"):
        assert text.endswith("data: [DONE]\n\n")
    elif response.status == 200:
        json.loads(text)
    return response.status


async def disturb(http, paths, done):
    """Abort, pause and publish until the others are done."""
    rng = random.Random(1)
    version = 0
    while not done.is_set():
        await asyncio.sleep(rng.random())
        await http.post("/abort_request", {"rid": f"{rng.randrange(256):04x}"})
        if rng.random() < 0.3:
            mode = rng.choice(["retract", "in_place", "abort"])
            await http.post("/pause_generation", {"mode": mode})
            version += 1
            body = {"model_path": str(paths[version % 2]), "weight_version": str(version)}
            status, answer = await http.post("/update_weights_from_disk", body)
            assert status == 200, answer
            await http.post("/continue_generation")
    return version


async def soak(http):
    paths = http.paths
    rng = random.Random(0)
    gate = asyncio.Semaphore(AT_ONCE)
    done = asyncio.Event()
    memory = []

    async def one(number):
        async with gate:
            leaves = rng.random() < 0.1
            status = await ask(http, body_of(rng, number), rng.random() if leaves else 600)
            if number % 2000 == 1999:
                memory.append(memory_of(http.server))
            return status

    trouble = asyncio.ensure_future(disturb(http, paths, done))
    statuses = await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    done.set()
    updates = await trouble
    figures = await http.until(lambda figures: not figures["running"] + figures["waiting"])
    return statuses, updates, figures, memory


def test_ten_thousand_requests_leave_nothing_behind(tmp_path):
    paths = [make_checkpoint(tmp_path / name, seed) for seed, name in enumerate("ab")]
    with serve(paths[0], tmp_path / "log") as server:

        async def conversation():
            async with Http(server) as http:
                http.server, http.paths = server, paths
                await http.session.close()
                http.session = aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(1200), connector=aiohttp.TCPConnector(limit=0)
                )
                return await soak(http)

        statuses, updates, figures, memory = asyncio.run(conversation())
        log = (tmp_path / "log").read_text()
    assert set(statuses) <= {200, 400, None} and statuses.count(200) > 0.8 * REQUESTS
    assert updates > 0
    assert figures["pages_available"] == figures["pages"]
    assert memory[-1] - memory[0] < MAX_GROWTH, [one >> 20 for one in memory]
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]


def test_weights_whose_directory_vanishes_midway_are_loaded_whole_or_not_at_all(server, checkpoint):
    async def conversation(http):
        rng = random.Random(0)
        outcomes = set()
        base = (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]
        for number in range(12):
            copy = checkpoint.parent / f"vanishing_{number}"
            shutil.copytree(checkpoint, copy)
            body = {"model_path": str(copy), "weight_version": f"v{number}"}
            update = asyncio.ensure_future(http.post("/update_weights_from_disk", body))
            await asyncio.sleep(rng.random() * 0.05)
            await asyncio.to_thread(shutil.rmtree, copy)
            status, answer = await update
            version = (await http.ask("GET", "/model_info"))[1]["weight_version"]
            assert (status == 200) == answer["success"] == (version == f"v{number}"), answer
            outcomes.add(status)
            sums = (await http.post("/weights_checker", {"action": "checksum"}))[1]["ranks"]
            assert sums == base  # the same weights under another name, whole
            assert (await http.generate(sampling_seed=1))["output_ids"]
        await http.post(
            "/update_weights_from_disk", {"model_path": str(checkpoint)} | {"weight_version": "0"}
        )
        return outcomes

    assert 400 in talk(server, conversation)
