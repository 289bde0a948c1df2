r"""Train the tiny preset's byte-level BPE from the curriculum's own text.

python -m envs.tasks.terminal.corpus --out=corpus.jsonl
python -m rome.model.tokenizer.train --corpus=corpus.jsonl --out=rome/model/tokenizer/tiny

Text that a tiny model must copy from an observation into a command has the same ids in both places:
words do not include the space before them (only the function words of instructions do), digits
stand alone, operators and flags include their spaces. The head and tail of a tool call and the
shell's usual complaints are one token each. The added tokens and their kinds (special or not) are
Qwen3's.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from rome.model.tokenizer.chat import Chat
from rome.model.tokenizer.tokenizer import Tokenizer, byte_level

VOCAB_SIZE = 768
ADDED = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
}
TINY_PATTERN = "|".join(
    [
        r'\n\{"name": "bash", "arguments": \{"command": "',  # the head of a call
        r'"\}\}\n',  # its tail
        r"\n?\[exit |(?:user|assistant)\n|(?:/bin/)?bash: line 1: |: command not found",
        r": No such file or directory|\(no output\)",
        r" (?:the|to|in|of|with|has|have|and|it|its|into|file|files|word|number|name|named"
        r"|line|lines)(?!\p{L})",
        r" (?:>>?|&&) | -\p{L}+ ?| ?\$\(\(|\)\)|\./",  # operators and flags of the shell
        r"\.\p{L}+|\p{L}+|\p{N}",  # extensions, words, single digits
        r"[^\s\p{L}\p{N}]|\n+|\s",
    ]
)


def render(episode: dict) -> str:
    """Return an episode as the chat that the model reads, control tokens as text."""
    header = "<|im_start|>assistant\n"
    text = f"<|im_start|>user\n{episode['instruction']}<|im_end|>\n{header}"
    for turn in episode["turns"]:
        text += turn["text"] + "<|im_end|>"
        if turn["observation"]:
            response = f"<tool_response>\n{turn['observation']}\n</tool_response>"
            text += f"\n<|im_start|>user\n{response}<|im_end|>\n{header}"
    return text


def plain_pieces(text: str) -> Iterator[str]:
    """Yield the text between control tokens, which merges are learned from."""
    for token in ADDED:
        text = text.replace(token, "\0")
    return (piece for piece in text.split("\0") if piece)


def train(episodes: list[dict], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Return a tokenizer of at most `vocab_size` ids, control tokens last.

    It has fewer when every piece of the text is one token before that.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level(TINY_PATTERN)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces = (piece for episode in episodes for piece in plain_pieces(render(episode)))
    backend.train_from_iterator(pieces, trainer)
    added = []
    for content, special in ADDED.items():
        added.append(tokenizers.AddedToken(content, special=special, normalized=False))
    backend.add_tokens(added)
    return Tokenizer(backend)


def episode_tokens(tokenizer: Tokenizer, episode: dict) -> int:
    """Count the tokens of a whole episode, as rollouts do."""
    chat = Chat(tokenizer)
    turns = episode["turns"]
    opening = len(chat.open(episode["instruction"]))
    written = sum(len(chat.turn(turn["text"])) for turn in turns)
    observed = sum(len(chat.observe([turn["observation"]])) for turn in turns[:-1])
    return opening + written + observed


def report(tokenizer: Tokenizer, episodes: list[dict]) -> str:
    """Return a table of the mean and largest number of tokens an episode, by family."""
    by_family: dict[str, list[int]] = {}
    for episode in episodes:
        by_family.setdefault(episode["family"], []).append(episode_tokens(tokenizer, episode))
    lines = []
    for family, counts in by_family.items():
        mean = sum(counts) / len(counts)
        lines.append(f"{family:14s} mean {mean:6.1f}  max {max(counts):4d}")
    return "\n".join(lines)


def main() -> None:
    """Train from the command line's corpus and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    episodes = [json.loads(line) for line in arguments.corpus.read_text().splitlines()]
    tokenizer = train(episodes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments.out)
    print(f"{tokenizer.vocab_size} ids in {arguments.out}\n{report(tokenizer, episodes)}")


if __name__ == "__main__":
    main()
