"""Where an answer ends: stop strings, searched for in the end of the output only."""

from hypothesis import example, given
from hypothesis import strategies as st

from rome.model.tokenizer import TINY, Tokenizer
from rome.serve.request import Request, SamplingParams
from rome.serve.stopping import find_end


class Bytes:
    """A tokenizer of one id for each byte, as in a byte-level BPE without merges."""

    vocab_size = 256
    decoded = 0  # ids so far

    def decode(self, ids, skip_special=False):
        self.decoded += len(ids)
        return bytes(ids).decode(errors="replace")


def request_for(stop, max_new_tokens=10_000):
    return Request("a", [1], SamplingParams(max_new_tokens, stop=tuple(stop)))


def feed(request, ids, tokenizer, step):
    """Give the tokens in calls of `step`, as the scheduler does; return why the answer ended."""
    for start in range(0, len(ids), step):
        tokens = ids[start : start + step]
        count, finish = find_end(request, tokens, tokenizer)
        request.output_ids += tokens[:count]
        if finish:
            return finish
    return None


def end_by_reading_all(ids, stop, tokenizer):
    """The rule itself: the first token with which a stop string stands in the whole text."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode([one for one in ids[:count] if one < tokenizer.vocab_size])
        matches = [(text.find(one), one) for one in stop if one in text]
        if matches:
            return count, *min(matches)
    return None


LETTERS = st.sampled_from("ab \nä€😀\ufffd")


@given(
    text=st.text(LETTERS, min_size=1, max_size=120),
    noise=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=6),
    stop=st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3),
    step=st.sampled_from([1, 4]),
)
@example("a" * 200 + "bä", [], ["bä"], 4)
@example("😀" * 80 + "a", [], ["\ufffda", "😀a"], 1)
def test_the_end_is_where_reading_the_whole_text_finds_it(text, noise, stop, step):
    """Also with broken characters, and with ids beyond the vocabulary, which have no text."""
    ids = list(text.encode())
    for place, token in noise:
        ids.insert(place % (len(ids) + 1), token)
    request = request_for(stop)
    finish = feed(request, ids, Bytes(), step)
    wanted = end_by_reading_all(ids, stop, Bytes())
    if wanted is None:
        assert finish is None and request.text_end is None
        return
    count, place, matched = wanted
    assert finish == {"type": "stop", "matched": matched}
    assert (len(request.output_ids), request.text_end) == (count, place)


def test_the_end_is_the_same_with_a_real_tokenizer():
    tokenizer = Tokenizer.load(TINY)
    ids = tokenizer.encode("naïve 😀 words, ls -la | grep x; " * 20 + "<the end> and more")
    request = request_for(["<the end>", "never"])
    assert feed(request, ids, tokenizer, 4) == {"type": "stop", "matched": "<the end>"}
    assert (len(request.output_ids), request.text_end) == end_by_reading_all(
        ids, ["<the end>"], tokenizer
    )[:2]


def test_the_work_grows_with_the_output_not_with_its_square():
    def decoded(length):
        tokenizer = Bytes()
        feed(request_for(["<end>"]), [97] * length, tokenizer, 4)
        return tokenizer.decoded

    assert decoded(4000) < 2.2 * decoded(2000) < 2000 * 400
