"""A small random model and a real `launch.serve` process, for tests of server and client."""

import asyncio
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rome.engine.client import Engine
from rome.engine.process import ServerProcess, start_server
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import load_hf, save_hf
from rome.model.qwen3 import Qwen3, head_kernel, init_params
from rome.model.tokenizer import TINY, Tokenizer

SLOTS, CONTEXT, CHUNK, LAYERS, TOP_K = 8, 512, 16, 2, 2
FLAGS = (
    "--slots",
    str(SLOTS),
    "--max_context",
    str(CONTEXT),
    "--page_tokens",
    str(CHUNK),
    "--call_tokens",
    "16",
)
ONE_PROGRAM = ("--call_tokens", "4")  # starts faster


def make_config() -> ModelConfig:
    tokenizer = Tokenizer.load(TINY)
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        experts_per_token=TOP_K,
        moe_intermediate_size=32,
        rope_theta=1e4,
        max_position=CONTEXT,
        initializer_range=0.3,
        remat="none",
        eos_token_id=tokenizer.im_end,
        pad_token_id=tokenizer.pad,
    )


def make_params(seed: int) -> dict:
    """Weights large enough that contexts matter and experts differ."""
    return jax.device_get(init_params(make_config(), jax.random.key(seed)))


def make_checkpoint(
    directory: pathlib.Path, seed: int = 0, endless: bool = False, max_position: int = CONTEXT
) -> pathlib.Path:
    """A directory for the server.

    `endless`: its end token lies outside the vocabulary, so that sampling goes on to its full
    length, at most `max_position` with its prompt.
    """
    config = dataclasses.replace(make_config(), max_position=max_position)
    save_hf(
        make_params(seed),
        dataclasses.replace(config, eos_token_id=config.vocab_size) if endless else config,
        directory,
    )
    Tokenizer.load(TINY).save(directory)
    return directory


def serve(directory: pathlib.Path, log: pathlib.Path, *flags: str, **options) -> ServerProcess:
    return start_server(directory, log, flags=[*FLAGS, *flags], deadline_seconds=400, **options)


async def until_running(engine: Engine, *tasks: asyncio.Future) -> None:
    """Wait until the engine works on a request of these tasks.

    It ends as well when all are done: where this process waits long for a processor, an engine
    may have answered before anybody looks.
    """
    async with asyncio.timeout(60):
        while not all(task.done() for task in tasks):
            if (await engine.server_info())["internal_states"][0]["running"]:
                return
            await asyncio.sleep(0.003)


@dataclasses.dataclass
class Oracle:
    """The plain forward pass over a whole sequence, without any cache."""

    config: ModelConfig
    params: dict

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Oracle":
        params, config = load_hf(directory)
        return cls(dataclasses.replace(config, remat="none"), params)

    def logits_and_routes(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [T, V] (row t predicts token t + 1) and routes [T, layers, k].

        Padded to one shape: compiled once.
        """
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        logits_TV, routes_LTk = _forward(
            self.config, self.params, padded, (np.arange(128)[None] < len(ids)).astype(np.int32)
        )
        return np.asarray(logits_TV)[: len(ids)], np.asarray(routes_LTk)[:, : len(ids)].transpose(
            1, 0, 2
        )

    def logprobs(self, ids: list[int], temperature: float = 1.0) -> np.ndarray:
        """log p(ids[t] | before), for t from 1."""
        logits_TV = self.logits_and_routes(ids)[0].astype(np.float64) / temperature
        logp_TV = (
            logits_TV
            - np.log(np.exp(logits_TV - logits_TV.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits_TV.max(-1, keepdims=True)
        )
        return logp_TV[np.arange(len(ids) - 1), ids[1:]]


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    out = Qwen3(config).apply({"params": params}, tokens_BT, positions_BT, segments_BT)
    return jnp.matmul(out.hidden_BTD[0], head_kernel(params, config)), out.routes_LBTK[:, 0]
