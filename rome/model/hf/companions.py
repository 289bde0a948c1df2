"""The files beside the weights of a Hugging Face checkpoint that programs need to serve it."""

from __future__ import annotations

import pathlib

from rome.files import write_atomically

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION = "generation_config.json"


def copy_companions(
    directory: pathlib.Path, tokenizer: pathlib.Path, model: pathlib.Path | None
) -> list[str]:
    """Copy the files of the tokenizer and of generation, byte for byte; return their names.

    Args:
      directory: gets them.
      tokenizer: folder that the tokenizer was loaded from.
      model: folder that the weights come from; None: there is none. Its generation_config.json
        comes before that of the tokenizer.
    """
    folders = dict.fromkeys(TOKENIZER_FILES, tokenizer)
    has_own_generation = model is not None and (model / GENERATION).is_file()
    folders[GENERATION] = model if model is not None and has_own_generation else tokenizer
    names = [name for name, folder in folders.items() if (folder / name).is_file()]
    for name in names:
        write_atomically(directory / name, (folders[name] / name).read_bytes())
    return names
