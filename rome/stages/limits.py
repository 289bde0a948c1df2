"""The limits of a config compared with what the model, the tasks and the engines need."""

from __future__ import annotations

import ml_collections

from rome.agent.loop import told_tools
from rome.model.config import ModelConfig
from rome.model.tokenizer import Chat
from rome.stages.tasks import tasks_of
from rome.train.workdir import ConfigError


def check_episode_limits(
    config: ml_collections.ConfigDict, model_config: ModelConfig, chat: Chat
) -> None:
    """Raise ConfigError where no episode could begin, before anything is started."""
    if config.max_context > model_config.max_position:
        raise ConfigError(
            f"max_context={config.max_context} is longer than the {model_config.max_position}"
            " positions of the model. Lower --config.max_context."
        )
    lengths = {}
    for task in tasks_of(config).examples():
        told = told_tools(chat, task) if config.tell_tools else chat
        lengths[f"{task.name} of the family {task.family}"] = len(told.open(task.content.opening))
    longest = max(lengths, key=lambda what: lengths[what])
    needed = lengths[longest] + config.max_new_tokens
    if config.max_context <= lengths[longest]:
        raise ConfigError(
            f"max_context={config.max_context} is too short for {longest}, whose first prompt has"
            f" {lengths[longest]} tokens. Set --config.max_context to {needed} or more (one turn"
            " has up to"
            f" max_new_tokens={config.max_new_tokens}), and --config.row_length to no less."
        )


def check_text_limits(config: ml_collections.ConfigDict, model_config: ModelConfig) -> None:
    """Raise ConfigError for rows of text that are longer than the model's positions."""
    if config.row_length > model_config.max_position:
        raise ConfigError(
            f"row_length={config.row_length} is longer than the {model_config.max_position}"
            " positions of the model. Lower --config.row_length."
        )
