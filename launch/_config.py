"""The flag --config of the commands that run an experiment."""

from __future__ import annotations

import pathlib

from absl import flags
from ml_collections import ConfigDict, config_flags


def define_config(default: str) -> flags.FlagHolder:
    """Define --config: an experiment file, and its keys as --config.KEY.

    Keys that the file does not have are taken, for they may be those of own code; whoever runs the
    config checks them (`rome.stages.config.check_config`).
    """
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "An experiment file, with :PRESET after it where it has several.",
        lock_config=False,
        accept_new_attributes=True,
    )


def read_config(holder: flags.FlagHolder) -> ConfigDict:
    """Return the config that the flags give; the folder of its file is searched for own code."""
    from rome.own_code import search_in

    file = config_flags.get_config_filename(flags.FLAGS[holder.name])
    search_in(pathlib.Path(file.partition(".py:")[0]).parent)
    return holder.value.lock()
