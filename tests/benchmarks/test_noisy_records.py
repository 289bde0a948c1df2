"""Noisy records: how faults are spread, what the filter leaves, and files that SFT reads."""

import asyncio
import collections
import json

import pytest

from benchmarks import noisy_records
from benchmarks.noisy_data import FAULTS, HONEST
from benchmarks.noisy_records import choose_files, plant, write_files
from envs.sources import open_source
from rome.data.formats.records import Limits, open_library
from rome.data.relevance import mask_turns
from rome.model.tokenizer import TINY, Tokenizer

ANY = ("wrong", "corrupted")
POSSIBLE = [("poisoned", *ANY), ("hacked", *ANY), ANY, ANY] * 25


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_a_quarter_of_the_faulty_records_has_each_fault(rate):
    planted = plant(POSSIBLE, rate, seed=0)
    each = round(rate * 25)
    assert collections.Counter(planted.values()) == {fault: each for fault in FAULTS if each}
    assert all(fault in POSSIBLE[place] for place, fault in planted.items())
    assert planted == plant(POSSIBLE, rate, seed=0)


def test_more_of_a_fault_than_records_can_have_is_refused():
    with pytest.raises(ValueError, match=r"30 of 120 records should be poisoned, and 25 can be"):
        plant(POSSIBLE + [ANY] * 20, 1.0, seed=0)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match="is no share of the records; give 0 to 1"):
        plant(POSSIBLE, rate, seed=0)


def test_filtered_files_lack_what_their_stages_reject_and_nothing_else():
    verdicts = {
        (0, HONEST): {},
        (1, "poisoned"): {"events": True},
        (2, "wrong"): {"events": False, "naive": True},
        (3, "hacked"): {"events": False, "naive": False},
        (1, HONEST): {},
    }
    played = {key: (None, verdict) for key, verdict in verdicts.items()}
    planted = {0.1: {}, 0.5: {1: "poisoned", 2: "wrong", 3: "hacked"}}
    files = choose_files(played, planted, 4)
    assert files["rate_10"] == [(0, HONEST), (1, HONEST)]  # the others could not be played
    assert [fault for _, fault in files["rate_50"]] == [HONEST, "poisoned", "wrong", "hacked"]
    assert [fault for _, fault in files["rate_50_filtered"]] == [HONEST, "poisoned", "hacked"]
    assert [fault for _, fault in files["rate_50_filtered_events"]] == [HONEST, "hacked"]


@pytest.mark.slow
def test_sft_reads_the_files_and_masks_their_harmful_turns(monkeypatch, tmp_path):
    chosen = ("small-rules-delete", "clean-small-rules-delete", "small-hackable-must")
    source = open_source("safety:small")
    monkeypatch.setattr(source, "families", chosen)
    card = asyncio.run(write_files(source, tmp_path, 2, [0.0, 0.7], 2))
    assert card["spoiled"] == 0
    assert card["files"]["rate_0"] == {HONEST: 6}
    assert card["files"]["rate_70"] == {HONEST: 2, **dict.fromkeys(FAULTS, 1)}
    assert json.loads((tmp_path / "card.json").read_text()) == card
    files = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    journal = tmp_path / "played.journal"
    journal.write_text(journal.read_text() + '{"name": "cut o')  # by a kill
    monkeypatch.setattr(noisy_records, "play", None)  # nothing is played again
    assert asyncio.run(write_files(source, tmp_path, 2, [0.0, 0.7], 2)) == card
    assert files == {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    kept = card["files"]["rate_70_filtered_events"]
    assert kept[HONEST] == 2 and not {"poisoned", "hacked", "wrong"} & set(kept)
    blind = card["files"]["rate_70_filtered"]
    assert blind["poisoned"] == blind["hacked"] == 1 and not blind["wrong"]
    library = open_library(
        str(tmp_path / "rate_70.jsonl"), Tokenizer.load(TINY), Limits(256, 16), 0.01
    )
    assert not library.set_aside
    records = [record for part, _ in library.training for record in part]
    harmful = [chunk for record in records for chunk in record.chunks if chunk.events]
    assert {kind for chunk in harmful for kind in chunk.events} <= {"destroyed", "tests"}
    for record in records:
        masked = mask_turns(record, ["harm"])
        for before, after in zip(record.chunks, masked.chunks, strict=True):
            assert (after.kind == "context") == bool(before.events)
