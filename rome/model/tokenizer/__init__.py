"""The tokenizer: tokenizer.json files, chat templates, and the training of the tiny one."""

from rome.model.tokenizer.tokenizer import TINY, Chat, Tokenizer

__all__ = ["TINY", "Chat", "Tokenizer"]
