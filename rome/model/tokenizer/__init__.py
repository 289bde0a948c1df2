"""The tokenizer: tokenizer.json files, chat templates, and the training of the tiny one."""

from rome.model.tokenizer.chat import Chat
from rome.model.tokenizer.tokenizer import TINY, Tokenizer

__all__ = ["TINY", "Chat", "Tokenizer"]
