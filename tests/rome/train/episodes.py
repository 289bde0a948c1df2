"""Episodes of several turns with a real engine process and a random model, for tests of what the
trainer makes of them.
"""

import asyncio
import dataclasses
import pathlib

import numpy as np

from rome.agent.loop import Limits, run_episode
from rome.data.trajectory import Trajectory
from rome.engine.client import Engine
from rome.engine.process import ServerProcess, start_server
from rome.losses import LOSSES, LossConfig
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import save_hf
from rome.model.sharding import make_mesh
from rome.train.state import make_optimizer
from rome.train.step import Learner
from tests.rome.rollout.worlds import CHAT, EchoEnv

CONTEXT = 160
PACKING = {"row_length": CONTEXT, "chunks_per_row": 16, "gamma": 0.95, "failure_reward": -1.0}


def make_config(**changes) -> ModelConfig:
    """Experts that differ, and many of them near a tie."""
    return dataclasses.replace(
        ModelConfig(
            vocab_size=CHAT.tokenizer.vocab_size,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            num_experts=16,
            experts_per_token=4,
            moe_intermediate_size=32,
            rope_theta=1e4,
            max_position=512,
            router_aux_loss_coef=0.0,
            remat="none",
            scan_layers=False,
            eos_token_id=CHAT.tokenizer.im_end,
            pad_token_id=CHAT.tokenizer.pad,
        ),
        **changes,
    )


def serve(params: dict, config: ModelConfig, directory: pathlib.Path) -> ServerProcess:
    save_hf(params, config, directory)
    return start_server(
        directory,
        directory / "engine.log",
        flags=[
            "--skip_tokenizer_init",
            "--slots=8",
            f"--max_context={CONTEXT}",
            "--call_tokens=16",  # two programs
            f"--dtype={config.dtype}",
        ],
        deadline_seconds=800,
    )


@dataclasses.dataclass
class ShortTurns:
    """An engine whose turns end where their tokens do: a random model hardly ever says that it has
    finished.
    """

    engine: Engine

    async def generate(self, input_ids, sampling, deadline_s, *, affinity=None):
        completion = await self.engine.generate(
            input_ids,
            dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, 7)),
            deadline_s,
        )
        return dataclasses.replace(completion, finish_reason="stop")


def play(
    server: ServerProcess, config: ModelConfig, count: int, routes: bool = True
) -> list[Trajectory]:
    async def run():
        async with Engine(server.url, model=config) as engine:
            return await asyncio.gather(
                *(
                    run_episode(
                        ShortTurns(engine),
                        EchoEnv(f"echo/{n}"),
                        CHAT,
                        Limits(CONTEXT, 40),
                        seed=n,
                        routes=routes,
                    )
                    for n in range(count)
                )
            )

    return asyncio.run(run())


def make_learner(config: ModelConfig, loss: str = "ipa", mesh: dict | None = None) -> Learner:
    optimizer = make_optimizer(
        learning_rate=1e-3, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
    )
    return Learner(config, LOSSES[loss], LossConfig(), optimizer, make_mesh(mesh or {}, config))


def mismatch(batch, logp_BT: np.ndarray) -> dict[str, float]:
    """Trainer against engine over the sampled tokens: k3 of KL(engine || trainer), and the largest
    difference of one logprob.
    """
    difference = (logp_BT - batch.logp_rollout_BT)[batch.action_mask_BT]
    return {
        "kl": float(np.mean(np.exp(difference) - difference - 1)),
        "mean": float(np.abs(difference).mean()),
        "max": float(np.abs(difference).max()),
    }
