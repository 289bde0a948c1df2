"""Noisy data: what is left after stages, and one family's records of every fault for real."""

import asyncio

import pytest

from benchmarks import noisy_data
from benchmarks.noisy_data import FAULTS, HONEST, STAGES, Judged, left, summarise


def judged(fault, *rejecting, family="a", turns=((False, False, False),)):
    return Judged(family, fault, {stage: stage in rejecting for stage in STAGES}, turns)


def test_what_is_left_follows_from_what_is_caught_and_lost():
    none = dict.fromkeys(FAULTS, 0.0)
    assert left(none, 0.0, 0.3) == pytest.approx(0.3)
    assert left(dict.fromkeys(FAULTS, 1.0), 0.5, 0.3) == 0.0
    half = {**none, "wrong": 1.0, "hacked": 1.0}
    assert left(half, 0.0, 0.4) == pytest.approx(0.2 / 0.8)
    assert left(none, 0.5, 0.4) == pytest.approx(0.4 / 0.7)  # lost honest ones make it worse


def test_a_pipeline_rejects_what_any_of_its_stages_does():
    runs = [judged(HONEST), judged("poisoned", "events"), judged("wrong", "naive")]
    runs += [judged("hacked", "suite"), judged("corrupted")]
    summary = summarise(runs, 0, [0.1])
    whole = summary["pipelines"]["heuristic with events, judge, naive execution"]
    caught = {fault: whole["caught"][fault]["value"] for fault in FAULTS}
    assert caught == {"poisoned": 1, "wrong": 1, "hacked": 0, "corrupted": 0}
    assert summary["pipelines"]["none"]["left"]["0.1"] == pytest.approx(0.1)
    assert whole["lost"]["value"] == 0


def test_masks_are_counted_apart_for_harmful_and_harmless_turns():
    turns = ((True, False, True), (False, False, False), (False, True, True))
    masks = summarise([judged(HONEST, turns=turns)], 0, [0.1])["masks"]
    assert masks["harmful turns masked by rules"]["value"] == 0
    assert masks["harmful turns masked by record"]["value"] == 1
    assert masks["harmless turns masked by rules"]["value"] == 0.5


@pytest.mark.slow
def test_every_fault_is_planted_and_met_by_the_stage_that_can_see_it(monkeypatch):
    chosen = {
        name: noisy_data.SMALL_SEEDS[name] for name in ("small-rules-delete", "small-hackable-must")
    }
    monkeypatch.setattr(noisy_data, "SMALL_SEEDS", chosen)
    found, spoiled = asyncio.run(noisy_data.measure(1, 2))
    assert spoiled == 0 and {one.fault for one in found} == {HONEST, *FAULTS}
    for one in found:
        harmful = one.fault in ("poisoned", "hacked")
        assert one.rejected["events"] == harmful and not one.rejected["heuristic"]
        if one.fault != "corrupted":  # of numbers alone it is not seen
            assert one.rejected["suite"] == (harmful or one.fault == "wrong")
            assert one.rejected["naive"] == (one.fault == "wrong")
        assert any(turn[0] for turn in one.turns) == harmful
