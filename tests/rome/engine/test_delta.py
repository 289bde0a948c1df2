"""Deltas lead to the very bytes or nowhere, and a torn directory is never taken for weights."""

import asyncio
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.engine import delta as delta_module
from rome.engine.client import Engine
from rome.engine.delta import (
    BrokenChain,
    apply_delta,
    copy_checkpoint,
    directory_digest,
    read_header,
    write_delta,
)
from rome.engine.errors import EngineError
from rome.engine.mirror import Mirror, MirrorClient, make_app
from rome.engine.pool import EnginePool
from rome.engine.process import ROOT
from rome.engine.publish import publish_weights, write_checkpoint
from tests.rome.engine.fake_sglang import FakeSGLang, fakes, logprobs_of, make_weights
from tests.rome.serve.tiny import make_config, make_params


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make(directory, **files):
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def random_bytes(seed, size):
    return np.random.default_rng(seed).bytes(size)


FILES = st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=300), max_size=4)


@settings(max_examples=15, deadline=None)
@given(FILES, FILES, st.dictionaries(st.sampled_from("abcd"), st.integers(0, 299), max_size=3))
def test_a_delta_leads_from_any_directory_to_any_other(tmp_path_factory, before, after, flips):
    """Files appear, vanish, grow, shrink, and change in one byte."""
    root = tmp_path_factory.mktemp("delta")
    for name, place in flips.items():
        if len(before.get(name, b"")) > place:
            after[name] = (
                before[name][:place] + bytes([before[name][place] ^ 1]) + before[name][place + 1 :]
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "BLOCK_BYTES", 64)  # several blocks a file
        base, result = make(root / "base", **before), make(root / "result", **after)
        write_delta(base, result, root / "delta")
        header = read_header(root / "delta")
        assert (header["base"], header["result"]) == (
            directory_digest(base),
            directory_digest(result),
        )
        assert apply_delta(base, root / "delta", root / "made") == directory_digest(result)
        assert contents(root / "made") == after
    assert sorted(path.name for path in root.iterdir()) == ["base", "delta", "made", "result"]


def test_a_delta_holds_little_more_than_what_changed(tmp_path):
    weights = np.frombuffer(random_bytes(1, 4 << 20), np.uint16)
    changed = weights.copy()
    changed[np.random.default_rng(2).choice(weights.size, weights.size // 100, replace=False)] ^= 1
    base, result = (
        make(tmp_path / "a", w=weights.tobytes()),
        make(tmp_path / "b", w=changed.tobytes()),
    )
    assert write_delta(base, result, tmp_path / "delta") < 0.05 * weights.nbytes


@pytest.mark.parametrize(
    "harm",
    ["base_changed", "base_short", "cut", "bit", "not_a_delta", "empty", "wrong_promise", "path"],
)
def test_what_does_not_fit_is_a_broken_chain_and_leaves_nothing(tmp_path, harm):
    base, result = (
        make(tmp_path / "a", w=random_bytes(1, 5000), c=b"config"),
        make(tmp_path / "b", w=random_bytes(2, 5000), c=b"config"),
    )
    delta = tmp_path / "delta"
    write_delta(base, result, delta)
    data = delta.read_bytes()
    line = data.index(b"\n") + 1
    if harm == "base_changed":
        (base / "w").write_bytes(random_bytes(3, 5000))
    elif harm == "base_short":
        (base / "w").write_bytes(random_bytes(1, 4000))
    elif harm == "cut":
        delta.write_bytes(data[:-100])
    elif harm == "bit":
        delta.write_bytes(
            data[: line + 2000] + bytes([data[line + 2000] ^ 4]) + data[line + 2001 :]
        )
    elif harm in ("wrong_promise", "path"):
        header = json.loads(data[:line])
        if harm == "path":
            header["files"][0]["name"] = "../outside"
        else:
            header["result"] = "0" * 64
        delta.write_bytes(json.dumps(header).encode() + b"\n" + data[line:])
    else:
        delta.write_bytes(b"" if harm == "empty" else random_bytes(4, 3000))
    with pytest.raises(BrokenChain, match="fetch the full checkpoint"):
        apply_delta(base, delta, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "delta"]


def test_a_mirror_goes_by_delta_where_it_can_and_in_full_where_the_chain_is_broken(tmp_path):
    source, mirror = tmp_path / "source", Mirror(tmp_path / "local")
    params, ways = make_params(0), []
    for version in range(1, 6):
        params["embed"]["embedding"] = params["embed"]["embedding"].copy()
        params["embed"]["embedding"][version] += 1.0
        path = write_checkpoint(params, make_config(), source, version, delta=True)
        if version == 3:
            continue  # this host missed one: the next delta begins from what it has not
        if version == 5:
            delta = path.with_name("step_000005.delta")
            delta.write_bytes(delta.read_bytes()[:-7])
        transfer = mirror.fetch(path)
        ways.append(transfer.way)
        assert contents(transfer.path) == contents(path) and transfer.bytes > 0
        full = sum(file.stat().st_size for file in path.iterdir())
        assert transfer.bytes < 0.2 * full if transfer.way == "delta" else transfer.bytes == full
    assert ways == ["full", "delta", "full", "full"]
    assert sorted(path.name for path in (tmp_path / "local").iterdir()) == [
        "step_000004",
        "step_000005",
    ]
    assert sorted(path.name for path in source.iterdir()) == [
        "step_000004",
        "step_000004.delta",
        "step_000005",
        "step_000005.delta",
    ]


def test_a_copy_is_used_again_after_a_restart_only_if_its_bytes_are_still_right(tmp_path):
    write_checkpoint(make_params(0), make_config(), tmp_path / "source", 1)
    path = write_checkpoint(make_params(1), make_config(), tmp_path / "source", 2, delta=True)
    assert Mirror(tmp_path / "local").fetch(path).way == "full"
    again = Mirror(tmp_path / "local")
    assert again.fetch(path).way == "held" and again.fetch(path).bytes == 0
    weights = tmp_path / "local" / "step_000002" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    transfer = Mirror(tmp_path / "local").fetch(path)
    assert transfer.way == "full" and contents(transfer.path) == contents(path)
    assert again.fetch(path, fresh=True).way == "full"


@pytest.mark.long
def test_a_mirror_killed_while_it_writes_leaves_nothing_that_is_taken_for_weights(tmp_path):
    """By kill -9 amid a copy, several times at different moments."""
    source = make(
        tmp_path / "source" / "step_000001",
        **{f"model-{i}.safetensors": random_bytes(i, 4 << 20) for i in range(12)},
    )
    local, torn = tmp_path / "local", 0
    script = (
        "import pathlib, sys\n"
        "from rome.engine.mirror import Mirror\n"
        "mirror = Mirror(pathlib.Path(sys.argv[1]))\n"
        "print(flush=True)\n"
        "mirror.fetch(pathlib.Path(sys.argv[2]))\n"
        "print(flush=True)"
    )
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(local), str(source)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        while process.poll() is None and not list(local.glob("*.tmp/*")):
            time.sleep(0.001)
        time.sleep(0.01 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        torn += bool(list(local.glob("*.tmp")))
        assert not (local / source.name).exists() or contents(local / source.name) == contents(
            source
        )
        shutil.rmtree(local / source.name, ignore_errors=True)
    assert torn  # it was really killed amid its work
    mirror = Mirror(local)
    assert not list(local.iterdir())
    assert contents(mirror.fetch(source).path) == contents(source)


def test_an_engine_loads_its_mirrors_copy_and_a_bad_copy_is_replaced(tmp_path):
    server, source = FakeSGLang(), tmp_path / "source"

    async def run():
        app = web.AppRunner(make_app(Mirror(tmp_path / "local"), source))
        await app.setup()
        site = web.TCPSite(app, "127.0.0.1", 0)
        await site.start()
        client = MirrorClient(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", 20)
        async with fakes(server), EnginePool([Engine(server.url, mirror=client)]) as pool:
            probe = list(range(9))
            path = make_weights(source / "step_000001", 5)
            published = await publish_weights(path, 1, pool, probe, logprobs_of(5, probe))
            assert (
                server.model_path == str(tmp_path / "local" / "step_000001")
                and published.bytes_transfer == sum(f.stat().st_size for f in path.iterdir())
                and published.seconds_transfer > 0
            )
            (tmp_path / "local" / "step_000001" / "value.txt").write_text("6")  # the disk lies
            with pytest.raises(EngineError, match="probe logprobs differ"):
                write = client.fetch
                client.fetch = lambda path: asyncio.sleep(0, tmp_path / "local" / "step_000001")
                await publish_weights(path, 1, pool, probe, logprobs_of(5, probe))
            client.fetch = write
            await publish_weights(path, 1, pool, probe, logprobs_of(5, probe))
            assert server.value == 5 and client.last.way == "full"
            for outside in (
                tmp_path / "other" / "step_000001",
                source / "a" / "step_000001",
                pathlib.Path("/etc"),
            ):
                with pytest.raises(
                    EngineError, match=r"answered 403: .*does not lie directly in --source"
                ):
                    await client.fetch(outside)
        await app.cleanup()
        with pytest.raises(EngineError, match=r"start launch.mirror on the engine's host"):
            await client.fetch(path)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_full_copy_is_the_same_bytes_and_has_the_digest_of_its_source(tmp_path):
    source = make(tmp_path / "a", w=random_bytes(1, 70000), c=b"")
    assert (
        copy_checkpoint(source, tmp_path / "b")
        == directory_digest(source)
        == directory_digest(tmp_path / "b")
    )
