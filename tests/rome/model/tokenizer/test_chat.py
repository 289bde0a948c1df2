"""Chats of every Qwen3: the ids of the checkpoint's own template, whole and turn by turn."""

import functools
import json
import pathlib
import random
import shutil

import jinja2
import jinja2.ext
import pytest

from envs.gem import parse_tool_calls
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.model.tokenizer.template import DEFAULT
from tests.paths import shared_data

OWN = pathlib.Path(__file__).with_name("templates")
WORDS = [
    "ls -la",
    "ä",
    "\n",
    " ",
    "  x",
    "{}",
    '"',
    "\\",
    "日本",
    "<b>",
    "|",
    "</",
    "a_b",
    "1",
    "\t",
]
HOSTILE = ["<|im_end|>", "<|im_start|>system\n", "<tool_call>", "</tool_response>", "<think>", "<|"]


def written(kind):
    """The template of a family, as these tests have it."""
    if kind == "instruct":
        return DEFAULT
    if kind == "coder":
        return (OWN / "coder.jinja").read_text()
    forced = "true" if kind == "thinking" else "false"
    return (OWN / "thinking.jinja").read_text().replace("if forced", f"if {forced}")


def published(kind):
    return (shared_data("chat_templates") / f"{kind}.jinja").read_text()


KINDS = ["instruct", "hybrid", "thinking", "coder"]
MANY = pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])


@pytest.fixture(scope="module", params=[written, published], ids=["written", "published"])
def source_of(request):
    return request.param


def tokenizer_with(folder, template, tokenizer=TINY):
    """A checkpoint's folder with a tokenizer and a template of its own."""
    folder.mkdir(exist_ok=True)
    for path in tokenizer.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


@functools.cache
def compiled(template):
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template)


def reference(template, messages, tools, hands_over):
    """The text that the template alone gives."""
    return compiled(template).render(
        messages=messages, tools=tools, add_generation_prompt=hands_over
    )


class Random(random.Random):
    """Random parts of conversations."""

    def text(self, most=6, words=WORDS):
        return "".join(self.choice(words) for _ in range(self.randint(0, most)))

    def tool(self):
        properties = {
            f"p{number}": {"type": "string", "description": self.text(), "enum": [self.text()]}
            for number in range(self.randint(0, 3))
        }
        schema = {"type": "object", "properties": properties, "required": list(properties)[:1]}
        function = {"name": f"tool{self.randint(0, 9)}", "description": self.text()}
        return {"type": "function", "function": function | {"parameters": schema}}

    def call(self):
        arguments = {f"p{number}": self.text() for number in range(self.randint(0, 3))}
        if self.random() < 0.3:
            arguments["deep"] = {"list": [1, self.text(), None], "flag": True}
        function = {"name": f"tool{self.randint(0, 9)}", "arguments": arguments}
        return {"type": "function", "function": function}

    def assistant(self, thinks):
        content = self.text()
        if thinks:
            content = f"<think>\nso{self.text()}so\n</think>\n\n{content.lstrip()}"
        calls = [self.call() for _ in range(self.randint(0, 2))]
        return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})

    def conversation(self, thinks, questions=1):
        messages = []
        if self.random() < 0.5:
            messages.append({"role": "system", "content": self.text() or "s"})
        for _ in range(self.randint(1, questions)):
            messages.append({"role": "user", "content": self.text()})
            for _ in range(self.randint(0, 3)):
                messages.append(self.assistant(thinks))
                for _ in range(self.randint(1, 2)):
                    messages.append({"role": "tool", "content": self.text()})
            messages.append(self.assistant(thinks))
        tools = [self.tool() for _ in range(self.randint(0, 2))] or None
        return messages, tools


@MANY
@pytest.mark.parametrize("kind", KINDS)
def test_random_chats_have_the_ids_of_the_checkpoints_own_template(
    kind, source_of, count, tmp_path
):
    source = source_of(kind)
    tokenizer = tokenizer_with(tmp_path / kind, source)
    rng = Random(kind)
    for _ in range(count):
        messages, tools = rng.conversation(rng.random() < 0.5, questions=3)
        hands_over = rng.random() < 0.5
        expected = reference(source, messages, tools, hands_over)
        ids = Chat(tokenizer, tools).render(messages, hands_over=hands_over)
        assert ids == tokenizer.encode(expected, allow_special=True), messages


@MANY
@pytest.mark.parametrize("kind", KINDS)
def test_random_episodes_built_turn_by_turn_have_the_ids_of_the_whole(
    kind, source_of, count, tmp_path
):
    tokenizer = tokenizer_with(tmp_path / kind, source_of(kind))
    rng = Random(kind)
    for _ in range(count):
        messages, tools = rng.conversation(thinks=kind in ("hybrid", "thinking"))
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        chat = Chat(tokenizer, tools, system)
        rest = messages[1:] if system is None else messages[2:]
        ids = chat.open(messages[len(messages) - len(rest) - 1]["content"])
        results = []
        for message in rest:
            if message["role"] == "tool":
                results.append(message["content"])
                continue
            ids += chat.observe(results) if results else []
            results = []
            calls = [
                (call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls", [])
            ]
            text = chat.say(message["content"], calls) if calls else message["content"]
            ids += chat.turn(text)
        newline = tokenizer.encode("\n")
        asked = messages if system is None else messages[1:]
        assert ids + newline == chat.render(asked), messages


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_others_hold_no_control_token_in_any_template(kind, source_of, tmp_path):
    tokenizer = tokenizer_with(tmp_path / kind, source_of(kind))
    rng = Random(kind)
    calm = Chat(tokenizer, [Random(1).tool()], "s")
    for _ in range(30):
        tool = rng.tool()
        tool["function"]["description"] = rng.text(words=HOSTILE)
        tool["function"]["parameters"]["tool_call"] = rng.text(words=HOSTILE)
        tool["function"]["parameters"]["|im_end|"] = {"</think>": rng.text(words=HOSTILE)}
        chat = Chat(tokenizer, [tool], rng.text(words=HOSTILE))
        results = [rng.text(words=HOSTILE), "<\ufdd0|im_end|>"]
        for ours, quiet in (
            (chat.open(rng.text(words=HOSTILE)), calm.open("x")),
            (chat.observe(results), calm.observe(["x", "y"])),
            (chat.reply([{"role": "user", "content": HOSTILE[1]}]), calm.reply([QUESTION])),
        ):
            control = set(tokenizer.id_of(name) for name in HOSTILE_TOKENS)
            assert [one for one in ours if one in control] == [
                one for one in quiet if one in control
            ]
        assert tokenizer.decode(chat.observe(results)).count(results[1]) == 1


QUESTION = {"role": "user", "content": "x"}
HOSTILE_TOKENS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>"]
HOSTILE_TOKENS += ["</tool_response>", "<|endoftext|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_said_in_the_models_own_form_and_read_back(kind, source_of, tmp_path):
    chat = Chat(tokenizer_with(tmp_path / kind, source_of(kind)))
    text = chat.say("Well.", [("bash", {"command": "cat <<E\n1 < 2\nE"}), ("stop", {})])
    assert [(one.name, one.arguments) for one in parse_tool_calls(text)] == [
        ("bash", {"command": "cat <<E\n1 < 2\nE"}),
        ("stop", {}),
    ]
    assert ("<function=bash>" in text) == (kind == "coder")


def test_a_header_that_opens_the_thoughts_is_told_and_a_plain_turn_ends_them(source_of, tmp_path):
    chat = Chat(tokenizer_with(tmp_path / "t", source_of("thinking")))
    decode = chat.tokenizer.decode
    assert decode(chat.open("x")).endswith("<|im_start|>assistant\n<think>\n")
    assert decode(chat.observe(["x"])).endswith("<|im_start|>assistant\n<think>\n")
    assert decode(chat.turn("Done.")) == "\n</think>\n\nDone.<|im_end|>"
    for thought in ("<think>\nHm.\n</think>\n\nDone.", "Hm.\n</think>\n\nDone."):
        assert decode(chat.turn(thought)) == "Hm.\n</think>\n\nDone.<|im_end|>"


@pytest.mark.parametrize(
    "template, named",
    [
        ("{% for %}", "the chat template is not one"),
        ("{{ raise_exception('no tools here') }}", "cannot render this chat .*no tools here"),
        ("{{ messages[0].content.__class__.mro() }}", "cannot render this chat .*SecurityError"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", "has no turn from"),
        (DEFAULT.replace("message.role ~ ", "message.role ~ loop.length ~ "), "be appended"),
    ],
    ids=range(5),
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(template, named, tmp_path):
    with pytest.raises(ValueError, match=named) as error:
        Chat(tokenizer_with(tmp_path / "t", template))
    assert "\n" not in str(error.value)


def test_a_template_of_its_own_file_comes_before_that_of_the_config(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "t", written("coder"))
    config = tmp_path / "t" / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": DEFAULT}))
    assert "<function=" in Chat(tokenizer).say("", [("a", {})])
    (tmp_path / "t" / "chat_template.jinja").unlink()
    assert "<function=" not in Chat(Tokenizer.load(tmp_path / "t")).say("", [("a", {})])
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": DEFAULT}]}))
    with pytest.raises(ValueError, match="several chat templates"):
        Tokenizer.load(tmp_path / "t")


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_apply_chat_template(kind, source_of, tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="pip install -r tests/requirements-live.txt"
    )
    tokenizer = tokenizer_with(tmp_path / "t", source_of(kind))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "t" / "tokenizer.json"),
        chat_template=source_of(kind),
    )
    rng = Random(kind)
    for _ in range(1000):
        messages, tools = rng.conversation(rng.random() < 0.5, questions=3)
        expected = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert Chat(tokenizer, tools).render(messages, hands_over=True) == expected
