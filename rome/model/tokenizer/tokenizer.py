"""Text to ids and back.

Two kinds of directory load: one with a tokenizer.json (Hugging Face `tokenizers`), or one with
Qwen's own `qwen.tiktoken` (byte-pair ranks) and tokenizer_config.json (the added tokens).

Control tokens (`<|im_start|>`, `<tool_call>`, ...) come from chat templates, never from untrusted
text: `encode` spells them out letter by letter unless the caller says that the text may hold them.
They are the special tokens and the added ones in angle brackets. Everything else is encoded as
transformers does, other added tokens included.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rome.files import find_shipped, read_json
from rome.model.tokenizer.template import DEFAULT, ChatTemplate

BROKEN = "Fetch the tokenizer again."  # what to do about a damaged file
LONG = 1 << 13  # characters of a text whose encoding takes long enough for others to wait
TINY = pathlib.Path(__file__).parent / "tiny"  # ships with the tiny preset; made by train.py
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Byte-level BPE with added tokens. Ids below `vocab_size` decode; every text encodes.

    Args:
      backend: of the package tokenizers.
      chat_template: of the model that it belongs to.
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str = DEFAULT) -> None:
        self._chat_template = chat_template
        # A tokenizer.json may keep the limits that its last user set; transformers ignores them.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        document = json.loads(backend.to_str())
        # for turns: no special token is found in a text
        self._turn = _without_special_tokens(document)
        # for untrusted text: no control token is
        self._special = [one["content"] for one in document["added_tokens"] if one["special"]]
        for token in document["added_tokens"]:
            token["special"] = token["special"] or _is_in_brackets(token["content"])
        self._control = [one["content"] for one in document["added_tokens"] if one["special"]]
        self._plain = _without_special_tokens(document)
        self.im_start = self.id_of("<|im_start|>")
        self.im_end = self.id_of("<|im_end|>")
        self.pad = self.id_of("<|endoftext|>")
        self.eos = self.im_end
        # Published generation configs stop at both; base models often sample the second.
        self.turn_ends = (self.im_end, self.pad)
        largest_id = max(backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size = largest_id + 1

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, or qwen.tiktoken with tokenizer_config.json; and the chat template.

        Raises:
          FileNotFoundError: neither is there.
          ValueError: the files do not belong together or are damaged.
        """
        directory = find_shipped(directory)
        whole = directory / "tokenizer.json"
        if whole.is_file():
            return cls(_from_file(whole), _chat_template(directory))
        ranks = directory / "qwen.tiktoken"
        config = directory / "tokenizer_config.json"
        if ranks.is_file() and config.is_file():
            return cls(_from_tiktoken(ranks, config), _chat_template(directory))
        raise FileNotFoundError(
            f"no tokenizer in {directory}; expected tokenizer.json, or qwen.tiktoken and"
            " tokenizer_config.json"
        )

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """Return the chat template of the model."""
        return ChatTemplate(self._chat_template, self.control_ids, self._special)

    @functools.cached_property
    def longest(self) -> int:
        """Return the most bytes of a text that one id stands for."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=False)))

    @functools.cached_property
    def control_ids(self) -> dict[str, int]:
        """Return the id of each control token by its text."""
        return {content: self._added[content] for content in self._control}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, which `load` and Hugging Face read."""
        self._backend.save(str(pathlib.Path(directory) / "tokenizer.json"))

    def to_json(self) -> str:
        """Return the text of tokenizer.json."""
        return str(self._backend.to_str())

    def id_of(self, content: str) -> int:
        """Return the id of an added token.

        Raises:
          ValueError: this tokenizer has none of that name.
        """
        if content not in self._added:
            raise ValueError(
                f"tokenizer has no added token {content!r}; it has"
                f" {', '.join(sorted(self._added)) or 'none'}"
            )
        return self._added[content]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the ids of a text.

        Without `allow_special` no id is a control token's, whatever the text spells.
        """
        tokenizer = self._backend if allow_special else self._plain
        if len(text) > LONG:  # only a batch lets other threads run meanwhile
            return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_turn(self, text: str) -> list[int]:
        """Return the ids of an assistant's turn, as the model would have sampled it.

        Tool markers such as `<tool_call>` become their tokens; a text that spells `<|im_end|>`, or
        another special token, does not.
        """
        return self._turn.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids.

        `skip_special` leaves out special tokens such as `<|im_end|>`, not `<tool_call>`. A model's
        vocabulary is often padded beyond the tokenizer's, and an untrained model samples there:
        such an id reads as U+FFFD.
        """

        def is_known(number: int) -> bool:
            return 0 <= number < self.vocab_size

        texts = []
        for known, run in itertools.groupby(ids, is_known):
            numbers = list(run)
            if known:
                texts.append(self._backend.decode(numbers, skip_special_tokens=skip_special))
            else:
                texts.append("\ufffd" * len(numbers))
        return "".join(texts)

    def join(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of plain texts and control ids in order.

        Neighbouring texts are encoded as one: merges may cross their border.
        """
        ids: list[int] = []
        text = ""
        for part in [*parts, -1]:
            if isinstance(part, str):
                text += part
                continue
            ids += self.encode(text) if text else []
            ids.append(part)
            text = ""
        return ids[:-1]


def _chat_template(directory: pathlib.Path) -> str:
    """Return a checkpoint's chat template: a file of its own, or a text of tokenizer_config.json.

    Raises:
      ValueError: it has several.
    """
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    config = directory / "tokenizer_config.json"
    document = read_json(config, BROKEN) if config.is_file() else {}
    template = document.get("chat_template") or DEFAULT
    if not isinstance(template, str):
        raise ValueError(
            f"{config} has several chat templates. Write the one that is meant into"
            f" {directory / 'chat_template.jinja'}."
        )
    return template


def _from_file(path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is no tokenizer ({error}). {BROKEN}") from None


def _without_special_tokens(document: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json that spells special tokens out letter by letter."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_in_brackets(content: str) -> bool:
    return content.startswith("<") and content.endswith(">")


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that cuts text by the pattern and spells pieces in byte letters.

    Merges stay inside a piece.
    """
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, spell])


def _from_tiktoken(ranks_file: pathlib.Path, config_file: pathlib.Path) -> tokenizers.Tokenizer:
    """Build a tokenizer from Qwen's own files.

    A tiktoken file holds no byte-pair merges, only the order of the tokens: each token's last merge
    is found again from that order.
    """
    ranks: dict[bytes, int] = {}
    for line in ranks_file.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    letters = _byte_letters()
    vocabulary: dict[str, int] = {}
    merges: list[tuple[str, str]] = []
    for token, number in ranks.items():
        vocabulary[_spelling(token, letters)] = number
        if len(token) > 1:
            left, right = _last_merge(token, number, ranks)
            merges.append((_spelling(left, letters), _spelling(right, letters)))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level(QWEN_PATTERN)
    backend.decoder = decoders.ByteLevel()
    added = read_json(config_file, BROKEN).get("added_tokens_decoder")
    if not isinstance(added, dict):
        raise ValueError(f"{config_file} has no added_tokens_decoder. {BROKEN}")
    added_tokens = []
    for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
        special = entry["special"]
        added_token = tokenizers.AddedToken(entry["content"], special=special, normalized=False)
        added_tokens.append(added_token)
    backend.add_tokens(added_tokens)
    for number, entry in added.items():
        if backend.token_to_id(entry["content"]) != int(number):
            raise ValueError(
                f"added token {entry['content']!r} got id {backend.token_to_id(entry['content'])},"
                f" {config_file} says {number}: {ranks_file} does not belong to it"
            )
    return backend


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that BPE joins last to make the token.

    Found by merging its bytes in order of rank, with ranks below the token's own.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranked = []
        for place, (left, right) in enumerate(itertools.pairwise(parts)):
            ranked.append((ranks.get(left + right, rank), place))
        best, place = min(ranked)
        if best >= rank:
            raise ValueError(
                f"token {token!r} of rank {rank} cannot be made from tokens of lower rank; the"
                " ranks file is damaged"
            )
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for each byte.

    Printable ones stand for themselves, the others follow from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(others):
        letters[byte] = chr(0x100 + number)
    return letters


def _spelling(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)
