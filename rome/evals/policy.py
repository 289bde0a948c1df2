"""A model behind SGLang's protocol as an agent.

`rome.agent.loop` plays it, or the iFlow agent (`rome.agent.iflow.episode`), or a command in the
sandbox of each task (`rome.agent.command`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from typing import Protocol

from envs.rock import SandboxConfig
from envs.sources import Task
from rome.agent.command import CommandAgent, sampling_dialogue
from rome.agent.iflow.episode import IFlowAgent, run_iflow_episode
from rome.agent.loop import Limits, run_episode
from rome.agent.session import Generator
from rome.engine.client import Engine
from rome.engine.pool import EnginePool
from rome.engine.process import start_server
from rome.evals.agents import Outcome, StartedEnv, play_in_environment
from rome.evals.command import outcome_of, play_command
from rome.model.hf.checkpoint import read_config
from rome.model.tokenizer import TINY, Chat, Tokenizer

DEFAULT_MAX_CONTEXT = 4096
DEFAULT_MAX_TOKENS = 512


class ClosableGenerator(Generator, Protocol):
    """An engine, or a pool of engines, that can be closed."""

    async def close(self) -> None: ...


@dataclasses.dataclass
class Policy:
    """An agent that samples its turns from engines.

    Attributes:
      engine: closed by `close`.
      chat: writes instructions and observations as tokens.
      limits: of one episode.
      config: of the sandboxes.
      temperature: of sampling.
      tell_tools: whether the prompt has the tools and the system text of each environment; False
        leaves it to `chat`.
      command: plays in the place of the loop.
      iflow: plays in the place of the loop.
      name: recorded with each attempt.
    """

    engine: ClosableGenerator
    chat: Chat
    limits: Limits
    config: SandboxConfig
    temperature: float = 1.0
    tell_tools: bool = False
    command: CommandAgent | None = None
    iflow: IFlowAgent | None = None
    name: str = "policy"

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; every turn is sampled with a seed that derives from `seed`."""
        if self.command is not None:
            return await self._play_command(self.command, task, attempt, seed)

        async def play_episode(started: StartedEnv) -> Outcome:
            return await self._play_episode(started, attempt, seed)

        return await play_in_environment(task, self.config, play_episode, math.inf)

    async def _play_episode(self, started: StartedEnv, attempt: int, seed: int) -> Outcome:
        play = run_episode
        if self.iflow is not None:
            play = functools.partial(run_iflow_episode, agent=self.iflow)
        trajectory = await play(
            self.engine,
            started,
            self.chat,
            self.limits,
            seed=seed,
            temperature=self.temperature,
            episode=attempt,
            tell_tools=self.tell_tools,
        )
        return outcome_of(started, trajectory)

    async def _play_command(
        self, command: CommandAgent, task: Task, attempt: int, seed: int
    ) -> Outcome:
        dialogue = sampling_dialogue(
            self.engine, self.chat, self.limits, seed=seed, temperature=self.temperature
        )
        return await play_command(dialogue, command, self.limits, self.config, task, attempt, seed)

    async def close(self) -> None:
        """Close the connections to the engines."""
        await self.engine.close()


@contextlib.contextmanager
def open_policy(
    checkpoint: str | pathlib.Path,
    config: SandboxConfig,
    *,
    log_path: pathlib.Path,
    engines: Sequence[str] = (),
    max_context: int | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    episode_seconds: float = 600.0,
    slots: int = 4,
    command: CommandAgent | None = None,
    iflow: IFlowAgent | None = None,
) -> Iterator[Policy]:
    """Yield the policy of a checkpoint; an engine that it needs runs as long as the context.

    Args:
      checkpoint: Hugging Face directory. Where engines are given, only its tokenizer and config are
        read.
      config: of the sandboxes.
      log_path: output of the embedded engine.
      engines: URLs of SGLang servers; none starts an embedded engine.
      max_context: tokens of an episode; None for the model's own, at most DEFAULT_MAX_CONTEXT.
      max_tokens: of one turn; None for DEFAULT_MAX_TOKENS.
      temperature: of sampling; None for 1.
      episode_seconds: for which the environment may work in one attempt.
      slots: attempts that the embedded engine keeps in its cache.
      command: plays in the place of the loop.
      iflow: plays in the place of the loop.

    Raises:
      EngineError: the embedded engine did not start.
    """
    model = read_config(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)
    context = max_context or min(model.max_position, DEFAULT_MAX_CONTEXT)
    limits = Limits(context, max_tokens or min(DEFAULT_MAX_TOKENS, context), episode_seconds)
    # Models with the tiny tokenizer learn the form of a call from their data: they never saw the
    # description of a tool.
    tell_tools = tokenizer.vocab_size != Tokenizer.load(TINY).vocab_size
    with contextlib.ExitStack() as stack:
        urls = list(engines)
        if not urls:
            flags = [
                "--skip_tokenizer_init",
                f"--slots={slots}",
                f"--max_context={context}",
                f"--dtype={model.dtype}",
            ]
            server = stack.enter_context(start_server(checkpoint, log_path, flags=flags))
            urls = [server.url]
        yield Policy(
            EnginePool([Engine(url, model=model) for url in urls]),
            Chat(tokenizer),
            limits,
            config,
            1.0 if temperature is None else temperature,
            tell_tools,
            command,
            iflow,
            "command" if command else "iflow" if iflow else "policy",
        )


def checkpoint_digest(folder: pathlib.Path) -> str:
    """Return a hash over names, sizes and times of a checkpoint's files.

    Weights are too large to be read only to identify them.

    Raises:
      ValueError: it is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint {str(folder)!r} is no folder; give a Hugging Face directory, such as"
            " runs/X/final"
        )
    entries = []
    for path in folder.iterdir():
        if path.is_file():
            about = path.stat()
            entries.append((path.name, about.st_size, about.st_mtime_ns))
    entries.sort()
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()


def files_digest(folder: pathlib.Path) -> str:
    """Return a hash over the names, the modes and the content of all files below a folder."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            content = os.readlink(path).encode(errors="surrogateescape")
        elif path.is_file():
            content = path.read_bytes()
        else:
            continue
        name = str(path.relative_to(folder))
        mode = stat.S_IMODE(path.lstat().st_mode)
        found.update(json.dumps([name, mode, len(content)]).encode() + content)
    return found.hexdigest()
