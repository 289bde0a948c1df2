"""The parts of ROCK's services that need no sandbox: fair queueing, tokens, the hub, metrics,
archives, the shape of requests.
"""

import asyncio
import contextlib
import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.rock import (
    AgentFault,
    CommandResult,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    SandboxFileError,
    SessionEndedError,
)
from envs.rock.images.hub import EnvHub
from envs.rock.service.auth import Tokens, load_or_make_tokens, load_tokens
from envs.rock.service.fair import FairQueue
from envs.rock.service.held import MAX_KEPT_CALLS, HeldSandbox
from envs.rock.service.metrics import Metrics
from envs.rock.wire import archive
from envs.rock.wire.codec import (
    CONFIG,
    config_from_json,
    config_to_json,
    result_from_json,
    result_to_json,
)
from envs.rock.wire.errors import CODES, Refusal, decode_error, encode_error
from envs.rock.wire.fields import check, parse_json


def drain(queue, number=10**6):
    taken = []
    while len(taken) < number and (item := queue.take(lambda item: True)) is not None:
        taken.append(item)
    return taken


def test_a_user_with_five_thousand_waiting_does_not_starve_one_with_three():
    queue = FairQueue()
    for number in range(5000):
        queue.add(("many", number), "many", "", 256)
    drain(queue, 100)
    for number in range(3):
        queue.add(("few", number), "few", "", 256)
    assert [item for item in drain(queue, 8) if item[0] == "few"] == [
        ("few", 0),
        ("few", 1),
        ("few", 2),
    ]


def test_experiments_of_one_user_share_its_turns_and_large_ones_cost_more():
    queue = FairQueue()
    for number in range(40):
        queue.add(("a", number), "u", "a", 300)
        queue.add(("b", number), "u", "b", 100)
    first = drain(queue, 40)
    assert 8 <= sum(item[0] == "a" for item in first) <= 12  # a third of the cost of b's each
    assert [number for name, number in first if name == "a"] == list(
        range(sum(item[0] == "a" for item in first))
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("uvw"), st.sampled_from("xy"), st.integers(1, 9), st.booleans()),
        max_size=60,
    )
)
def test_nothing_is_lost_doubled_or_out_of_turn_within_an_experiment(steps):
    queue, waiting, taken = FairQueue(), [], []
    for number, (user, experiment, cost, take) in enumerate(steps):
        waiting.append((user, experiment, number))
        queue.add(waiting[-1], user, experiment, cost)
        if take:
            taken += drain(queue, 1)
    removed = [item for item in waiting if item not in taken][::3]
    assert all(queue.remove(item, item[0], item[1]) for item in removed)
    taken += drain(queue)
    assert sorted(taken + removed) == sorted(waiting) and len(queue) == 0
    for pair in {item[:2] for item in waiting}:
        numbers = [item[2] for item in taken if item[:2] == pair]
        assert numbers == sorted(numbers)


def test_tokens_are_made_once_kept_private_and_never_shown(tmp_path):
    path = tmp_path / "deep/tokens"
    made = load_or_make_tokens(path)
    assert (
        set(made) == {"default", "worker"}
        and load_or_make_tokens(path) == made
        and path.stat().st_mode & 0o777 == 0o600
    )
    tokens = Tokens(made)
    assert (
        tokens.user(made["default"]) == "default"
        and tokens.user("") is tokens.user(None) is tokens.user(made["default"][:-1]) is None
    )
    assert not any(token in repr(vars(tokens)) for token in made.values())
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="chmod 600"):
        load_tokens(path)
    for text, message in (
        ("a b c\n", 'not "name token"'),
        ("a short\n", "16 printable"),
        (f"a {'x' * 20}\nb {'x' * 20}\n", "the same token"),
        (f"ä {'x' * 20}\n", "user name"),
    ):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ValueError, match=message):
            load_tokens(path)


def test_the_hub_keeps_content_by_digest_and_names_by_owner(tmp_path):
    hub = EnvHub(tmp_path)

    async def pieces(*data):
        for piece in data:
            yield piece

    async def read(digest):
        return b"".join([piece async for piece in hub.fetch(digest)])

    digest, size = asyncio.run(hub.store(pieces(b"abc", b"def")))
    assert size == 6 and asyncio.run(read(digest)) == b"abcdef"
    hub.register("team/env:1", "environment", digest, "ada", tags=("t",))
    hub.register("copy", "environment", digest, "bob")
    hub.register("image", "image", f"sha256:{'0' * 64}", "bob", reference="debian:12")
    assert hub.get("team/env:1").digest == hub.get(digest).digest == digest and [
        entry.name for entry in hub.list(tag="t")
    ] == ["team/env:1"]
    assert [entry.name for entry in hub.list(owner="bob")] == ["copy", "image"]
    for deed, code in (
        (lambda: hub.register("copy", "environment", digest, "ada"), "forbidden"),
        (lambda: hub.delete("copy", "ada"), "forbidden"),
        (lambda: hub.get("nothing"), "not_found"),
        (lambda: hub.register("x", "environment", f"sha256:{'1' * 64}", "ada"), "not_found"),
    ):
        with pytest.raises(Refusal) as caught:
            deed()
        assert caught.value.code == code
    hub.delete("copy", "bob")
    assert asyncio.run(read(digest)) == b"abcdef"
    hub.delete("team/env:1", "ada")
    with pytest.raises(Refusal):  # its last name is gone
        asyncio.run(read(digest))
    hub.close()
    assert [entry.name for entry in EnvHub(tmp_path).list()] == ["image"]


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.count("rock_x_total", "Things.", route='a"b\nc')
    metrics.observe("rock_s_seconds", "Times.", 0.02)
    metrics.gauge("rock_g", "Now.", lambda: {(): 2.5})
    assert metrics.text().splitlines()[:3] == [
        "# HELP rock_g Now.",
        "# TYPE rock_g gauge",
        "rock_g 2.5",
    ]
    assert (
        'rock_s_seconds_bucket{le="0.025"} 1' in metrics.text()
        and "rock_s_seconds_count 1" in metrics.text()
        and 'rock_x_total{route="a\\"b\\nc"} 1' in metrics.text()
    )


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text("abé/x", min_size=1, max_size=150).filter(
            lambda name: (
                ".." not in name.split("/") and not name.startswith("/") and not name.endswith("/")
            )
        ),
        st.binary(max_size=1500),
        max_size=5,
    ),
    st.integers(1, 2000),
)
def test_an_archive_survives_both_ways_and_is_tars(files, size):
    data = pack(files)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == {
            archive.clean_name(name): content for name, content in files.items()
        }
    again, (count, total, skipped) = unpack(data, size)
    assert again == data  # member by member
    assert (count, total, skipped) == (len(files), sum(map(len, files.values())), [])


def pack(files) -> bytes:
    buffer = io.BytesIO()
    tar = archive.TarWriter(buffer.write)
    for name, content in files.items():
        read = io.BytesIO(content).read
        tar.file(archive.clean_name(name), 0o644, 1, len(content), read)
    tar.end()
    return buffer.getvalue()


def unpack(data: bytes, size: int = 700):
    """Give an archive's members to a writer of archives, read in pieces of a size."""
    buffer = io.BytesIO()
    tar = archive.TarWriter(buffer.write)
    source = io.BytesIO(data)
    archive.read_archive(lambda wanted: source.read(min(size, wanted)), tar)
    tar.end()
    return buffer.getvalue(), (tar.files, tar.bytes, tar.skipped)


def test_hostile_archives_are_refused_or_skipped():
    def tar(**fields):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive_:
            member = tarfile.TarInfo("x")
            for name, value in fields.items():
                setattr(member, name, value)
            archive_.addfile(member, io.BytesIO(b"abc") if member.isreg() and member.size else None)
        return buffer.getvalue()

    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(SandboxFileError):
            unpack(tar(name=name, size=3))
    with pytest.raises(SandboxFileError):
        unpack(tar(type=tarfile.LNKTYPE, linkname="/etc/passwd"))
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        assert unpack(tar(type=kind))[1] == (0, 0, ["x"])
    with pytest.raises(ValueError, match="an extended header of the archive has"):
        unpack(tar(pax_headers={"comment": "x" * (1 << 17)}))


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=1200), st.binary(max_size=30), st.integers(0, 1100))
def test_no_archive_brings_down_the_unpacking(data, change, at):
    valid = pack({"f": b"abc" * 40})
    for attempt in (data, valid[:at] + change + valid[at + len(change) :]):
        with contextlib.suppress(ValueError, SandboxError):
            unpack(attempt)


async def _collect(pieces):
    return [piece async for piece in pieces]


def test_errors_travel_by_code_and_what_is_said_never_names_a_type():
    for code, (status, kind) in CODES.items():
        told = decode_error(
            status, {"error": {"code": code, "message": "why", "reason": "missing"}}
        )
        assert isinstance(told, kind) and "why" in str(told)
    assert (
        decode_error(409, encode_error(SandboxFileError("missing", "no f"))[1]).reason == "missing"
    )
    assert isinstance(
        decode_error(410, encode_error(SandboxClosedError("gone"))[1]), SandboxClosedError
    )
    for kind in (AgentFault, SessionEndedError):  # neither may become the infrastructure's fault
        assert type(decode_error(*encode_error(kind("its own doing")))) is kind
    for body in (
        None,
        [],
        {"error": 5},
        {"error": {"code": "os.system", "message": 7}},
        {"error": {"code": ["x"]}},
        {"error": {"code": "file", "reason": "evil"}},
    ):
        assert type(decode_error(500, body)) is SandboxError
    assert "secret" not in str(encode_error(RuntimeError("secret"))[1])


def test_a_number_that_no_float_can_hold_is_out_of_range():
    for name in ("memory_mb", "cpus"):
        with pytest.raises(ValueError, match="it is between"):
            check(CONFIG, {name: 10**400})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(json_values, st.binary(max_size=60))
def test_anything_is_accepted_or_a_value_error(value, data):
    for attempt in (
        lambda: check(CONFIG, value),
        lambda: config_from_json(value),
        lambda: parse_json(data),
        lambda: check(CONFIG, {"memory_mb": value}),
    ):
        with contextlib.suppress(ValueError):
            attempt()
    told = result_to_json(CommandResult("o", "", 0, False, False, 0.1, ("disk",), 2, (3, 4)))
    assert result_from_json(json.loads(json.dumps(told))) == CommandResult(
        "o", "", 0, False, False, 0.1, ("disk",), 2, (3, 4)
    )
    for answer in (
        value,
        told | {"cut": [value]},
        told | {"cut": [1, None]},
        {name: told[name] for name in told if name != "cut"},
    ):
        with pytest.raises(SandboxError):
            result_from_json(answer)


def test_a_config_travels_without_our_secrets():
    config = SandboxConfig(
        backend="remote",
        url="http://a:1",
        token="the secret token",
        memory_mb=300,
        egress=("a.org:443",),
        label="l",
        env={"KEY": "the secret key"},
    )
    wire = config_to_json(config)
    assert "secret" not in str(wire) and "secret token" not in repr(config)
    there = config_from_json(wire)
    assert (there.memory_mb, there.egress, there.label, there.backend) == (
        300,
        ("a.org:443",),
        "l",
        "embedded",
    )
    assert "http" not in str(wire)


def test_a_call_that_was_cancelled_before_it_came_is_not_begun():
    """The cancellation travels on a connection of its own, which may be the faster one."""
    held = HeldSandbox(Sandbox(SandboxConfig()), {})
    held.cancel("early")
    begun = []
    with pytest.raises(Refusal, match="was cancelled before it came"):
        held.join("early", lambda: begun.append("work"))
    assert not begun
    for number in range(1000):  # what nobody sends stays bounded
        held.cancel(str(number))
    assert len(held._given_up) <= MAX_KEPT_CALLS
