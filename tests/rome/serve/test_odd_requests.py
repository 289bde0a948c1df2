"""Requests that are seldom sent: scores that are no numbers, special tokens before a stop string,
prefixes that are found and not used at once.
"""

import numpy as np
import pytest

from rome.model.tokenizer import TINY, Tokenizer
from rome.serve.answer import make_answer
from rome.serve.batching import Batcher
from rome.serve.checks import BadRequest, parse_row_count
from rome.serve.openai_api import Answers
from rome.serve.programs import Shapes
from rome.serve.protocol import Bounds, parse_generate
from rome.serve.request import Request, SamplingParams
from rome.serve.stopping import find_end
from tests.rome.serve.test_limits import IdleDevice, make_scheduler

TOKENIZER = Tokenizer.load(TINY)


def say(text, stop, **params):
    """Return a request that has said a text up to a stop string, and the pieces of its stream."""
    request = Request("r", [1], SamplingParams(99, stop=(stop,), **params), stream=True)
    answers = Answers({}, [request], TOKENIZER, "m", is_chat=False)
    said = []
    for token in TOKENIZER.encode(text, allow_special=True):
        _, request.finish = find_end(request, [token], TOKENIZER)
        request.output_ids.append(token)
        said += [chunk["choices"][0]["text"] for chunk in answers.chunks(request)]
        if request.finish:
            break
    return request, said


@pytest.mark.parametrize("stop", ["STOP", "c<|im_start|>ST"])
def test_special_tokens_before_a_stop_string_are_no_text(stop):
    text = "é<|im_end|>b\n<|im_start|>漢c<|im_start|>STOPd"
    request, said = say(text, stop)
    expected = "éb\n漢c" if stop == "STOP" else "éb\n漢"
    assert make_answer(request, "0", TOKENIZER)["text"] == "".join(said) == expected
    request, said = say(text, "STOP", skip_special_tokens=False)
    assert make_answer(request, "0", TOKENIZER)["text"] == text.removesuffix("STOPd")


class BrokenDevice(IdleDevice):
    """Scores of a prompt are no numbers."""

    def read(self, dispatch):
        steps = super().read(dispatch)
        return steps._replace(target_logprob_T=np.full_like(steps.target_logprob_T, np.nan))


@pytest.mark.parametrize("new", [0, 2])
def test_scores_that_are_no_numbers_are_an_error_of_the_engine_not_an_answer(new):
    scheduler = make_scheduler()
    scheduler.device = BrokenDevice(scheduler.shapes)
    scheduler.version = "7"
    request = Request("r", list(range(40)), SamplingParams(new), True, score_from=0)
    plain = Request("p", list(range(40)), SamplingParams(new))
    for one in (request, plain):
        scheduler._batcher.queue(one)
    while scheduler.busy():
        scheduler._step()
    assert request.finish["status_code"] == 500 and "weights 7" in request.finish["message"]
    assert plain.finish["type"] == "length"


def test_cached_tokens_are_counted_once_however_often_a_request_had_to_wait():
    shapes = Shapes(slots=4, max_context=32, cache_tokens=32, page_tokens=4, call_tokens=16)
    batcher = Batcher(shapes)

    def step():
        for piece in batcher.next_batch()[0]:
            batcher.note_computed(piece)
            request = piece.request
            if request.computed == len(request.ids):
                request.ids.append(5)
                request.output_ids.append(5)
            if len(request.output_ids) == request.sampling.max_new_tokens:
                batcher.remove(request)

    prompt = list(range(16))
    first = Request("1", prompt, SamplingParams(14))
    batcher.queue(first)
    while len(first.output_ids) < 2:
        step()
    second = Request("2", prompt + [77] * 14, SamplingParams(2))
    batcher.queue(second)
    for _ in range(5):
        step()
    assert second not in batcher.running  # it has a prefix in the cache, and no room beyond it
    while batcher.busy():
        step()
    assert second.cached_tokens == 16


@pytest.mark.parametrize("penalty", [1e-40, 5e-324])
def test_a_penalty_that_divides_by_almost_nothing_is_refused(penalty):
    body = {"input_ids": [1], "sampling_params": {"repetition_penalty": penalty}}
    with pytest.raises(BadRequest, match="repetition_penalty must be from"):
        parse_generate(body, Bounds(99, 500, frozenset()), None)


def test_a_number_of_rows_with_more_digits_than_python_reads_is_refused():
    with pytest.raises(BadRequest, match="truncate_size"):
        parse_row_count("9" * 5000)
