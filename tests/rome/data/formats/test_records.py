"""A library of records: divided by content, what does not fit set aside with its reason."""

import json
import pathlib

import numpy as np
import pytest

from rome.data.formats import records as records_module
from rome.data.formats.records import Limits, open_library
from rome.data.sources import endless_order
from rome.model.tokenizer import TINY, Tokenizer
from rome.stopping import Stopped
from tests.paths import shared_data
from tests.rome.data.formats import samples

pytestmark = pytest.mark.long

TOKENIZER = Tokenizer.load(TINY)
LIMITS = Limits(100_000, 100)


def talk(number, words=3):
    said = " ".join(str(number + word) for word in range(words))
    return [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": said}]


def write(path, numbers, words=3):
    lines = [json.dumps({"messages": talk(number, words)}) for number in numbers]
    path.write_text("\n".join(lines) + "\n")
    return path


def texts(records):
    return [records[number].chunks[-1].text for number in range(len(records))]


def open_it(spec, share=0.2, limits=LIMITS, **options):
    return open_library(str(spec), TOKENIZER, limits, share, **options)


def test_records_are_divided_by_their_content_alone(tmp_path):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "1.jsonl", range(40))
    whole = open_it(tmp_path / "a")
    ((training, weight),) = whole.training
    assert weight == 1.0 and whole.set_aside == []
    held_out, trained = texts(whole.held_out), texts(training)
    assert sorted(held_out + trained) == sorted(talk(n)[1]["content"] for n in range(40))
    assert 2 <= len(held_out) <= 16
    write(tmp_path / "a" / "0.jsonl", range(30, 50))  # copies of some, and new ones
    both = open_it(tmp_path / "a")
    assert set(held_out) <= set(texts(both.held_out))
    assert not set(texts(both.held_out)) & set(texts(both.training[0][0]))
    assert both.digest != whole.digest


def test_at_least_one_record_is_held_out(tmp_path):
    library = open_it(write(tmp_path / "x.jsonl", range(3)), share=1e-9)
    assert len(library.held_out) == 1 and library.count == 2


def test_parts_with_weights_are_drawn_by_their_shares(tmp_path):
    write(tmp_path / "a.jsonl", range(5, 10))
    write(tmp_path / "b.jsonl", range(100, 140))
    library = open_it(f"3*{tmp_path / 'a.jsonl'} + 1*{tmp_path / 'b.jsonl'}")
    assert [weight for _, weight in library.training] == [0.75, 0.25]
    order = endless_order(library.training, seed=0)
    drawn = [order[place].instruction for place in range(80)]
    of_a = [text for text in drawn if int(text.split()[1]) < 100]
    assert len(of_a) == 60 and len(set(of_a)) == len(library.training[0][0])


def hostile(folder: pathlib.Path) -> pathlib.Path:
    """A folder of every kind of file that does not fit, and one that does."""
    folder.mkdir()
    write(folder / "good.jsonl", range(10))
    lines = [json.dumps({"messages": talk(n)}) for n in (11, 12)]
    torn = lines[0].encode() + b'\n{"messages": [{"role\n\xff\xfe\n' + lines[1].encode()
    (folder / "lines.jsonl").write_bytes(torn)
    (folder / "torn.json").write_text('{"messages": [')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "schema.json").write_text('{"schema_version": "ATIF-v9", "steps": {"a": 1}}')
    (folder / "roles.json").write_text('{"messages": [{"role": "wizard", "content": "x"}]}')
    write(folder / "long.jsonl", [13], words=200)
    (folder / "fake.parquet").write_bytes(b"PAR1 and nothing else")
    return folder


def test_what_does_not_fit_is_set_aside_with_file_record_and_reason(tmp_path):
    library = open_it(hostile(tmp_path / "data"), limits=Limits(160, 16))
    assert library.count + len(library.held_out) == 12
    reasons = {}
    for entry in library.set_aside:
        name = pathlib.Path(entry["file"]).name
        reasons.setdefault(name, []).append(f"{entry['record']}: {entry['reason']}")
    assert {name: len(found) for name, found in reasons.items()} == {
        "lines.jsonl": 2,
        "torn.json": 1,
        "deep.json": 1,
        "schema.json": 1,
        "roles.json": 1,
        "long.jsonl": 1,
        "fake.parquet": 1,
    }
    assert reasons["lines.jsonl"][0].startswith("record 2, byte ")
    assert "not UTF-8" in reasons["lines.jsonl"][1]
    assert "wizard" in reasons["roles.json"][0]
    assert "at most 160 tokens (max_context)" in reasons["long.jsonl"][0]


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"messages": []}')
    with pytest.raises(ValueError, match=r"no record that can be trained on .*begins with nobody"):
        open_it(bad)
    good = write(tmp_path / "good.jsonl", range(9))
    with pytest.raises(ValueError, match=r"bad.json has no record"):
        open_it(f"0.5*{good} + 0.5*{bad}")
    with pytest.raises(ValueError, match=r"bad.json has no record"):
        open_it(f"{good} + {bad}")
    with pytest.raises(ValueError, match="leaves no record to hold out: give more"):
        open_it(write(tmp_path / "one.jsonl", [1]))
    with pytest.raises(ValueError, match="no file or folder"):
        open_it(tmp_path / "gone")


def test_an_index_saves_the_reading_until_a_file_or_a_setting_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", range(20))
    index = tmp_path / "index.npz"
    first = open_it(path, index=index)
    examined = []
    monkeypatch.setattr(
        records_module, "_examine_all", lambda *args: examined.append(1) or iter(())
    )
    again = open_it(path, index=index)
    assert not examined and again.digest == first.digest
    assert np.array_equal(again.training[0][0].places_N3, first.training[0][0].places_N3)
    assert texts(again.held_out) == texts(first.held_out)
    for change in (
        lambda: open_it(path, index=index, settings="another tokenizer"),
        lambda: open_it(path, index=index, limits=Limits(7, 7)),
        lambda: open_it(write(path, range(21)), index=index),
    ):
        with pytest.raises(ValueError, match="no record"):
            change()
    assert len(examined) == 3


def test_a_record_that_changes_while_it_is_trained_on_is_an_error_with_its_place(tmp_path):
    path = write(tmp_path / "x.jsonl", range(20))
    ((training, _),) = open_it(path).training
    path.write_text(path.read_text().replace('"role"', '"rule"'))
    with pytest.raises(ValueError, match=r"x.jsonl, byte \d+, was changed"):
        training[0]


def test_reading_can_be_stopped(tmp_path):
    with pytest.raises(Stopped):
        open_it(write(tmp_path / "x.jsonl", range(5)), should_stop=lambda: True)


# name: records that fit, the assistant's tokens of the first one
REAL = {
    "miniswe_github_issue.traj.json": (1, 609),
    "miniswe_local.traj.json": (1, 49),
    "nemogym_coding_token_ids.jsonl": (5, 785),
    "nemogym_workplace_assistant.jsonl": (5, 136),
    "sweagent_humanevalfix.traj": (1, 250),
    "sweagent_marshmallow_default.traj": (1, 808),
    "sweagent_marshmallow_function_calling.traj": (1, 946),
    "taubench_gpt4o_airline.json": (200, 1654),
}


@pytest.fixture(scope="module")
def real():
    """The library of all real files, and what each file gave in their order."""
    folder = shared_data("trajectories")
    qwen = Tokenizer.load(shared_data("qwen3_tokenizer"))
    found = records_module._examine_all(
        sorted(folder.iterdir()), qwen, Limits(32_768, 128), lambda: False
    )
    return qwen, list(found)


def test_every_real_file_is_read_whole(real):
    qwen, found = real
    by_file = {}
    for path, one in found:
        assert not one.reason, (path, one)
        by_file.setdefault(path, []).append(one.place)
    assert {path.name: len(places) for path, places in by_file.items()} == {
        name: count for name, (count, _) in REAL.items()
    }
    learned = {}
    for path, places in by_file.items():
        content = records_module.read_bytes(path, places[0])
        trajectory = records_module.read_trajectory(content, qwen)
        learned[path.name] = trajectory.num_action_tokens
    assert learned == {name: tokens for name, (_, tokens) in REAL.items()}


def test_ids_of_a_real_rollout_are_those_of_its_file(real):
    qwen, _ = real
    path = shared_data("trajectories/nemogym_coding_token_ids.jsonl")
    line = path.read_text().splitlines()[0]
    item = json.loads(line)["response"]["output"][1]
    (chunk,) = records_module.read_trajectory(line.encode(), qwen).chunks
    assert chunk.prompt_ids == item["prompt_token_ids"]
    assert chunk.action_ids == item["generation_token_ids"]
    assert chunk.logprobs == item["generation_log_probs"]


def test_ids_of_another_tokenizer_are_set_aside():
    path = shared_data("trajectories/nemogym_coding_token_ids.jsonl")
    with pytest.raises(ValueError, match=r"token id 151668, and the tokenizer has 748 tokens"):
        open_it(path)


def test_the_samples_are_all_of_the_formats_that_are_known():
    from rome.data.formats.detect import FORMATS

    assert sorted(samples.ALL) == sorted(name for name, _, _ in FORMATS)
