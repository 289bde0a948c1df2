"""Ids and text: the tiny tokenizer, Qwen3's own, and chats built by appending."""

import json
import unicodedata

import jinja2
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from envs.gem import format_tool_call
from envs.tasks.terminal import FAMILIES, HELD_OUT_FAMILIES, WORDS, make_task
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.model.tokenizer.train import ADDED, train
from tests.paths import shared_data

HOSTILE = st.lists(
    st.one_of(st.sampled_from([*ADDED, "user\n", "\n", "<|", "|>", "im_end"]), st.text(max_size=8)),
    max_size=10,
).map("".join)
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Läuft.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.load(TINY)


@pytest.fixture(scope="module")
def qwen3():
    return Tokenizer.load(shared_data("qwen3_tokenizer"))


# -- the tiny tokenizer
# -------------------------------------------------------------------------------------------------


@pytest.mark.long
@given(text=st.text())
def test_every_text_comes_back_in_normal_form(tiny, text):
    assert tiny.decode(tiny.encode(text)) == unicodedata.normalize("NFC", text)


@given(text=HOSTILE)
def test_untrusted_text_never_gives_a_control_id(tiny, text):
    ids = tiny.encode(text)
    assert not {tiny.id_of(content) for content in ADDED} & set(ids)
    assert tiny.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=HOSTILE)
def test_a_turn_has_call_markup_but_no_turn_boundary(tiny, text):
    assert not {tiny.im_start, tiny.im_end, tiny.pad} & set(tiny.encode_turn(text))


def test_control_tokens_are_one_id_each_where_allowed(tiny):
    for content, special in ADDED.items():
        assert tiny.encode(content, allow_special=True) == [tiny.id_of(content)]
        assert len(tiny.encode(content)) > 1
        assert tiny.decode([tiny.id_of(content)], skip_special=True) == ("" if special else content)


def test_each_curriculum_word_is_one_and_the_same_id_wherever_it_stands(tiny):
    for word in WORDS:
        (number,) = tiny.encode(word)
        for text in (
            f"grep {word} data.txt",
            f"{word}.txt",
            f"sed -i s/{word}/x/ data.txt",
            f"a\n{word} b",
            f"echo {word} > out.txt",
        ):
            assert tiny.encode(text).count(number) == 1, text


def test_each_digit_is_one_id(tiny):
    assert len(tiny.encode("1234567890")) == 10


def test_the_vocabulary_fits_the_tiny_preset(tiny):
    assert tiny.vocab_size <= 768


def test_a_tool_call_costs_five_ids_more_than_its_command(tiny):
    for command in ("cat note.txt", "grep -c red data.txt", "echo $((3+5)) > out.txt"):
        assert (
            len(tiny.encode_turn(format_tool_call("bash", {"command": command})))
            <= len(tiny.encode(command)) + 4
        )
    assert (
        10
        <= len(
            Chat(tiny).turn(
                format_tool_call(
                    "bash", {"command": "mv fox.txt t && mv owl.txt fox.txt && mv t owl.txt"}
                )
            )
        )
        <= 30
    )


@pytest.mark.parametrize("family", FAMILIES + HELD_OUT_FAMILIES)
def test_instructions_are_short(tiny, family):
    assert max(len(tiny.encode(make_task(family, seed).instruction)) for seed in range(20)) <= 35


def test_an_id_of_the_models_padding_reads_as_a_replacement_character(tiny):
    assert (
        tiny.decode([*tiny.encode("red fox"), tiny.vocab_size, *tiny.encode("bee")])
        == "red fox\N{REPLACEMENT CHARACTER}bee"
    )


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_a_saved_tokenizer_is_the_same(tiny, tmp_path):
    tiny.save(tmp_path)
    text = "<tool_call>\nWrite line 3 of data.txt\n<|im_end|>"
    assert Tokenizer.load(tmp_path).encode(text, allow_special=True) == tiny.encode(
        text, allow_special=True
    )


def test_training_is_deterministic_and_keeps_its_limit():
    turn = {
        "text": format_tool_call("bash", {"command": "cat note.txt"}),
        "observation": "red fox",
        "status": "ok",
    }
    episodes = [
        {"family": "x", "instruction": make_task("find", seed).instruction, "turns": [turn]}
        for seed in range(30)
    ]
    one, two = train(episodes, vocab_size=300), train(episodes, vocab_size=300)
    assert one.vocab_size == 300
    assert one.encode(episodes[0]["instruction"]) == two.encode(episodes[0]["instruction"])


# -- chats
# -------------------------------------------------------------------------------------------------


def test_a_chat_without_tools_starts_with_the_user(tiny):
    assert (
        tiny.decode(Chat(tiny).open("Hi"))
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@given(user=HOSTILE, result=HOSTILE)
def test_no_text_can_open_or_close_a_turn(tiny, user, result):
    chat = Chat(tiny, tools=[TOOL], system=user)
    ids = chat.open(user)
    assert (ids.count(tiny.im_start), ids.count(tiny.im_end)) == (3, 2)
    ids = chat.observe([result, result])
    assert (ids.count(tiny.im_start), ids.count(tiny.im_end)) == (2, 1)
    assert (
        ids.count(tiny.id_of("<tool_response>")) == ids.count(tiny.id_of("</tool_response>")) == 2
    )


@pytest.mark.long
def test_appended_chats_equal_the_rendered_template(qwen3):
    """Compare one encoding of the whole text by Qwen3's own template with turns appended."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(
        json.loads((shared_data("qwen3_tokenizer") / "tokenizer_config.json").read_text())[
            "chat_template"
        ]
    )
    call = format_tool_call("bash", {"command": "echo 'ä' \"b\" && ls"})
    for tools, system in (
        (None, None),
        (None, "Be brief."),
        ([TOOL], None),
        ([TOOL, TOOL], "Be brief.\n"),
    ):
        messages = ([{"role": "system", "content": system}] if system is not None else []) + [
            {"role": "user", "content": "\n Look  here.\n\n"},
            {"role": "assistant", "content": "Well.\n" + call},
            {"role": "tool", "content": "\nä\n"},
            {"role": "tool", "content": "b"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "bash", "arguments": {"command": "echo 'ä' \"b\" && ls"}}],
            },
            {"role": "tool", "content": ""},
        ]
        chat = Chat(qwen3, tools, system)
        ids = (
            chat.open("\n Look  here.\n\n")
            + chat.turn("Well.\n" + call)
            + chat.observe(["\nä\n", "b"])
            + chat.turn(call)
            + chat.observe([""])
        )
        rendered = template.render(messages=messages, tools=tools, add_generation_prompt=True)
        assert qwen3.decode(ids) == rendered
        assert ids == qwen3.encode(rendered, allow_special=True)


# -- Qwen3's own tokenizer
# -------------------------------------------------------------------------------------------------


def test_qwen3_ids_are_the_published_ones(qwen3):
    assert qwen3.encode("Hello world\n") == [9707, 1879, 198]
    assert qwen3.encode("<|im_start|>user\nHi<|im_end|>", allow_special=True) == [
        151644,
        872,
        198,
        13048,
        151645,
    ]
    assert (qwen3.vocab_size, qwen3.im_start, qwen3.im_end, qwen3.eos, qwen3.pad) == (
        151669,
        151644,
        151645,
        151645,
        151643,
    )


def test_a_real_tool_prompt_is_reproduced_by_appending(qwen3):
    expected = json.loads(
        (shared_data("qwen3_tokenizer") / "tool_prompt_457_ids.json").read_text()
    )["template_token_ids"]
    text = qwen3.decode(expected)
    assert len(expected) == 457

    def between(opening, closing, start=0):
        return text[
            text.index(opening, start) + len(opening) : text.index(
                closing, text.index(opening, start) + len(opening)
            )
        ]

    tools = [json.loads(line) for line in between("<tools>\n", "\n</tools>").splitlines()]
    chat = Chat(qwen3, tools)
    spoken = between("<|im_start|>assistant\n", "<|im_end|>")
    ids = (
        chat.open(between("<|im_start|>user\n", "<|im_end|>"))
        + chat.turn(spoken)
        + chat.observe([between("<tool_response>\n", "\n</tool_response>")])
    )
    assert ids == expected


def test_appending_keeps_sampled_ids_that_encoding_would_change(qwen3):
    """What a model samples is not always what its text encodes to; a second encoding would train on
    ids that nobody sampled.
    """
    sampled = json.loads((shared_data("qwen3_tokenizer") / "merged_tokens_drift.json").read_text())[
        "seen_token_ids"
    ]
    assert qwen3.encode(qwen3.decode(sampled), allow_special=True) != sampled
    history = sampled + Chat(qwen3).observe(["7"])
    assert history[: len(sampled)] == sampled
    appended = (
        "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert qwen3.decode(history) == qwen3.decode(sampled) + appended


@given(text=HOSTILE)
def test_untrusted_text_never_gives_a_control_id_of_qwen3(qwen3, text):
    assert max(qwen3.encode(text), default=0) < 151643


def test_a_damaged_ranks_file_is_refused(tmp_path):
    ranks = (shared_data("qwen3_tokenizer") / "qwen.tiktoken").read_bytes().splitlines()[:2000]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(ranks))
    (tmp_path / "tokenizer_config.json").write_bytes(
        (shared_data("qwen3_tokenizer") / "tokenizer_config.json").read_bytes()
    )
    with pytest.raises(ValueError, match="does not belong"):
        Tokenizer.load(tmp_path)


# -- the ids of transformers
# -------------------------------------------------------------------------------------------------


def limited(backend):
    backend.enable_truncation(8)
    backend.enable_padding(length=16)


def with_words(backend):
    backend.add_tokens(["zebra", tokenizers.AddedToken("<extra>", lstrip=True, rstrip=True)])


def with_flags(backend):
    whole = tokenizers.AddedToken("zebra", single_word=True, normalized=True)
    backend.add_tokens([whole, tokenizers.AddedToken(" fox", normalized=False)])


def lower(backend):
    folded = [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    backend.normalizer = tokenizers.normalizers.Sequence(folded)
    backend.add_tokens([tokenizers.AddedToken("ZEBRA", normalized=True)])


def with_start(backend):
    start = ("<|im_start|>", backend.token_to_id("<|im_start|>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[start]
    )


CHANGES = [limited, with_words, with_flags, lower, with_start]
WORDS_OF_TEXTS = ["zebra", "ZEBRA", " fox", "red", " ", "\n", "Cafe\u0301", "x" * 40, "<extra>"]
TRUSTED = [*WORDS_OF_TEXTS, "<|im_end|>", "<tool_call>"]


@pytest.fixture(scope="module", params=CHANGES)
def changed(request, tmp_path_factory):
    """A folder with a tokenizer.json as transformers writes it, what reads it there, and ours."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    request.param(backend)
    backend.save(str(folder / "tokenizer.json"))
    backend.no_truncation()  # as transformers does before each text that it does not cut
    backend.no_padding()
    return folder, backend, Tokenizer.load(folder)


@given(parts=st.lists(st.sampled_from(TRUSTED), max_size=8))
def test_ids_are_those_of_the_file_without_its_limits(changed, parts):
    _, backend, ours = changed
    text = "".join(parts)
    expected = backend.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allow_special=True) == expected
    if "<" not in text:
        assert ours.encode(text) == ours.encode_turn(text) == expected


def test_ids_are_those_of_transformers(changed):
    transformers = pytest.importorskip(
        "transformers", reason="pip install -r tests/requirements-live.txt"
    )
    folder, _, _ = changed
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.save_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for word in TRUSTED:
        text = f"red {word} bee{word} {word * 3}"
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids
