"""Seconds, tokens and operations of the updates alone."""

import threading
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.cost.flops import active_matmul_params, forward_flops, peak_flops, step_flops
from rome.cost.roofline import CHIPS
from rome.model.config import PRESETS
from rome.train.loop import Minibatch, StepData, work_of_step
from rome.train.speed import UpdateSeconds, count_work
from tests.rome.train.test_loop import rows_of


class Pending:
    """An array of the devices that is there when the test says so."""

    def __init__(self, error=None):
        self.is_there = threading.Event()
        self.error = error

    def block_until_ready(self):
        assert self.is_there.wait(30)
        if self.error:
            raise self.error
        return self


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("rome.train.speed.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def end_at(clock, now, pending, seconds):
    clock.now = now
    pending.is_there.set()
    return seconds.ended()


def test_updates_begin_when_the_ones_before_have_ended(clock):
    first, second, third = (Pending() for _ in range(3))
    one = UpdateSeconds(10.0, first)
    two = UpdateSeconds(11.0, second, one)
    assert end_at(clock, 13.0, first, one) == 13.0
    assert end_at(clock, 18.0, second, two) == 18.0
    clock.now = 99.0  # whenever they are asked
    assert (two.value(), one.value(), two.value()) == (5.0, 3.0, 5.0)
    three = UpdateSeconds(100.0, third, two)  # the devices were idle from 18 on
    end_at(clock, 104.0, third, three)
    assert three.value() == 4.0


def test_a_result_that_fails_is_raised_by_its_reader_and_not_here(clock):
    pending = Pending(RuntimeError("out of memory"))
    seconds = UpdateSeconds(1.0, pending)
    end_at(clock, 2.0, pending, seconds)
    assert seconds.value() == 1.0


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_work_counts_sequences_and_no_padding(rows, epochs):
    parts = [
        Minibatch([rows_of(lengths) for lengths in some], None) for some in (rows[:1], rows[1:])
    ]
    work = work_of_step(StepData(parts, {}), epochs)
    lengths = [length for row in rows for length in row]
    assert work == (epochs * sum(lengths), epochs * sum(length**2 for length in lengths), 0)


def test_the_operations_of_a_step_are_those_of_its_tokens_and_no_row_is_credited_whole():
    config = PRESETS["qwen3_30b_a3b"]
    assert active_matmul_params(config) == pytest.approx(3.042e9, rel=1e-3)
    tokens, length = 8 * 4096, 4096
    one_sequence = 3 * tokens * forward_flops(config, length)
    assert step_flops(config, tokens, 8 * length**2) == pytest.approx(one_sequence)
    by_hand = 6 * 3.042e9 + 6 * length * 32 * 128 * 48  # a token, with causal attention
    assert one_sequence / tokens == pytest.approx(by_hand, rel=1e-3)
    packed = count_work([rows_of([1024] * 4)])
    assert step_flops(config, packed.tokens, packed.squares) < 4096 * one_sequence / tokens


def test_the_peak_is_that_of_one_jax_device_and_unknown_devices_have_none():
    assert peak_flops("TPU v5p") == 459e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("TPU7x") == CHIPS["tpu7x"].peak_flops / 2
    assert peak_flops("cpu") is None and peak_flops("NVIDIA H100 PCIe") is None
    assert np.isfinite([chip.device_flops for chip in CHIPS.values()]).all()
