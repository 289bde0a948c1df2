"""Text to ids and back, and Qwen3's chat format built by appending ids.

Two kinds of directory load: one with a tokenizer.json (Hugging Face `tokenizers`), or one with
Qwen's own `qwen.tiktoken` (byte-pair ranks) and tokenizer_config.json (the added tokens).

Control tokens (`<|im_start|>`, `<tool_call>`, ...) come from this file's templates, never from text
of others: `encode` spells them out letter by letter unless it is told that the text may hold them.
A rollout is never rendered again: `Chat` gives the ids to append.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

TINY = pathlib.Path(__file__).parent / "tiny"  # ships with the tiny preset; made by train.py
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Byte-level BPE with added tokens. Ids below `vocab_size` decode; every text encodes."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        self._special = {token.content for token in added.values() if token.special}
        self._added_pattern = re.compile(
            "|".join(re.escape(content) for content in sorted(self._added, key=len, reverse=True))
            or r"(?!)"
        )
        document = json.loads(backend.to_str())
        document[
            "added_tokens"
        ] = []  # for text of others: the same merges, and no control token to be found
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(document))
        self.im_start, self.im_end, self.pad = (
            self.id_of(content) for content in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        )
        self.eos = self.im_end
        self.vocab_size = (
            max(backend.get_vocab(with_added_tokens=True).values()) + 1
        )  # one more than the largest id

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, or qwen.tiktoken with tokenizer_config.json.

        Raises FileNotFoundError when neither is there.
        """
        directory = pathlib.Path(directory)
        if (directory / "tokenizer.json").is_file():
            return cls(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
        if (directory / "qwen.tiktoken").is_file() and (
            directory / "tokenizer_config.json"
        ).is_file():
            return cls(
                _from_tiktoken(directory / "qwen.tiktoken", directory / "tokenizer_config.json")
            )
        raise FileNotFoundError(
            f"no tokenizer in {directory}; expected tokenizer.json, or qwen.tiktoken and"
            " tokenizer_config.json"
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, which `load` and Hugging Face read."""
        self._backend.save(str(pathlib.Path(directory) / "tokenizer.json"))

    def id_of(self, content: str) -> int:
        """The id of an added token. Raises ValueError when this tokenizer has none of that name."""
        if content not in self._added:
            raise ValueError(
                f"tokenizer has no added token {content!r}; it has"
                f" {', '.join(sorted(self._added)) or 'none'}"
            )
        return self._added[content]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text.

        Without `allow_special` no id is a control token's, whatever the text spells.
        """
        return (
            self.join(self._split(text))
            if allow_special
            else self._plain.encode(text, add_special_tokens=False).ids
        )

    def encode_turn(self, text: str) -> list[int]:
        """Ids of an assistant's turn, as the model would have sampled it: `<tool_call>` and its
        kind are tokens, `<|im_end|>` is not.
        """
        return self.join(self._split(text, keep=self._special))

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of ids. `skip_special` leaves out `<|im_end|>` and its kind, not `<tool_call>`.

        A model's vocabulary is often padded beyond the tokenizer's, and an untrained model samples
        there: such an id reads as U+FFFD.
        """
        text = []
        for known, run in itertools.groupby(ids, lambda number: 0 <= number < self.vocab_size):
            run = list(run)
            text.append(
                self._backend.decode(run, skip_special_tokens=skip_special)
                if known
                else "\ufffd" * len(run)
            )
        return "".join(text)

    def join(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of plain texts and control ids in order.

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

    def _split(self, text: str, keep: set[str] = frozenset()) -> list[str | int]:
        """The text cut at its control tokens; those in `keep` stay text."""
        parts: list[str | int] = []
        end = 0
        for match in self._added_pattern.finditer(text):
            if match[0] not in keep:
                parts += [text[end : match.start()], self._added[match[0]]]
                end = match.end()
        return [*parts, text[end:]]


class Chat:
    """Qwen3's chat format.

    Each method gives ids to append to what is there; nothing is rendered twice.

    With `tools` the first turn tells the model their schemas and the form of a call, as Qwen3's
    template does. Without tools and system text there is no system turn: a small model learns the
    form from its training data instead.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[dict[str, Any]] | None = None,
        system: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._tools, self._system = tools, system

    def open(self, user: str) -> list[int]:
        """From nothing through `<|im_start|>assistant` and its newline, where the model begins to
        write.
        """
        return self.tokenizer.join(
            [*self._system_turn(), self.tokenizer.im_start, "user\n", user, *self._hand_over()]
        )

    def turn(self, text: str) -> list[int]:
        """An assistant's turn that was not sampled here (an expert's), with the `<|im_end|>` that
        the model would sample.
        """
        return [*self.tokenizer.encode_turn(text), self.tokenizer.im_end]

    def observe(self, results: Sequence[str]) -> list[int]:
        """After a sampled `<|im_end|>`: its newline, the tool results in one user turn, the next
        assistant header.
        """
        opening, closing = (
            self.tokenizer.id_of("<tool_response>"),
            self.tokenizer.id_of("</tool_response>"),
        )
        parts: list[str | int] = ["\n", self.tokenizer.im_start, "user"]
        for result in results:
            parts += ["\n", opening, "\n", result, "\n", closing]
        return self.tokenizer.join([*parts, *self._hand_over()])

    def _hand_over(self) -> list[str | int]:
        return [self.tokenizer.im_end, "\n", self.tokenizer.im_start, "assistant\n"]

    def _system_turn(self) -> list[str | int]:
        if not self._tools:
            return (
                [self.tokenizer.im_start, "system\n", self._system, self.tokenizer.im_end, "\n"]
                if self._system is not None
                else []
            )
        begin, end = self.tokenizer.id_of("<tool_call>"), self.tokenizer.id_of("</tool_call>")
        return [
            self.tokenizer.im_start,
            "system\n",
            f"{self._system}\n\n" if self._system is not None else "",
            (
                "# Tools\n\nYou may call one or more functions to assist with the user"
                " query.\n\nYou are provided with function signatures within <tools></tools> XML"
                " tags:\n<tools>"
            ),
            *(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in self._tools),
            (
                "\n</tools>\n\nFor each function call, return a json object with function name and"
                " arguments within "
            ),
            begin,
            end,
            " XML tags:\n",
            begin,
            '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
            end,
            self.tokenizer.im_end,
            "\n",
        ]


# -- Qwen's own file
# -------------------------------------------------------------------------------------------------


def _from_tiktoken(ranks_file: pathlib.Path, config_file: pathlib.Path) -> tokenizers.Tokenizer:
    """The byte-pair merges are not in a tiktoken file, only the order of the tokens: each token's
    last merge is found again from that order.
    """
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in ranks_file.read_bytes().splitlines() if line)
    }
    letters = _byte_letters()
    merges = [
        tuple(_spelling(part, letters) for part in _last_merge(token, rank, ranks))
        for token, rank in ranks.items()
        if len(token) > 1
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={_spelling(token, letters): rank for token, rank in ranks.items()}, merges=merges
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level(QWEN_PATTERN)
    backend.decoder = decoders.ByteLevel()
    added = json.loads(config_file.read_text())["added_tokens_decoder"]
    backend.add_tokens(
        [
            tokenizers.AddedToken(entry["content"], special=entry["special"], normalized=False)
            for _, entry in sorted(added.items(), key=lambda item: int(item[0]))
        ]
    )
    for number, entry in added.items():
        if backend.token_to_id(entry["content"]) != int(number):
            raise ValueError(
                f"added token {entry['content']!r} got id {backend.token_to_id(entry['content'])},"
                f" {config_file} says {number}: {ranks_file} does not belong to it"
            )
    return backend


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cuts the text by the pattern, then spells each piece in byte letters; merges stay inside a
    piece.
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE joins last to make the token: merge the bytes in order of rank, with
    ranks below the token's own.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        best, i = min(candidates)
        if best >= rank:
            raise ValueError(
                f"token {token!r} of rank {rank} cannot be made from tokens of lower rank; the"
                " ranks file is damaged"
            )
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: printable ones stand for themselves, the others
    follow from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


def _spelling(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)
