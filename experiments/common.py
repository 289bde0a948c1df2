"""Blocks of configuration that the shipped experiments share.

Each function returns a new ConfigDict, so an experiment may change its own copy.
"""

from typing import NamedTuple

import ml_collections


class Pod(NamedTuple):
    """A published checkpoint and the TPU slice that trains it.

    Attributes:
      checkpoint: a Hugging Face directory; it also holds the tokenizer.
      rows: rows of a micro-batch, one for each device.
      mesh: sizes of the mesh axes that are not 1.
    """

    checkpoint: str
    rows: int
    mesh: dict[str, int]


# The slices are v5p:4x4x4 and v5p:8x8x4. IPA compiles for both (launch.compile); not run.
PODS = {
    "qwen3_30b_a3b": Pod("Qwen3-30B-A3B", 64, {"fsdp": 4, "expert": 16}),
    "qwen3_235b_a22b": Pod("Qwen3-235B-A22B", 256, {"fsdp": 16, "expert": 16}),
}

# Presets of ipa and sft that train on other tasks than tiny does.
TASK_PRESETS = ("games", "mixture", "small")


def own(*roles: str) -> ml_collections.ConfigDict:
    """Return the blocks of the keys that own code declares, one for each role."""
    return ml_collections.ConfigDict({role: {} for role in roles})


def learner() -> ml_collections.ConfigDict:
    """Return how the train step is computed: rematerialisation, kernels, router, memory."""
    block = ml_collections.ConfigDict()
    # what the backward pass computes again: none, full, attention, offload (rome/model/config.py)
    block.remat = "none"
    block.attention = "auto"  # kernels by name (rome/model/ops/kernels.py)
    block.experts = "auto"
    block.exchange = "auto"
    # lines of an RL step that begin alike are computed once: auto, on, off (docs/algorithms.md)
    block.prefix_tree = "auto"
    block.dtype = ""  # float32 or bfloat16; empty: the model's own
    block.capacity_factor = 0.0  # of an expert; 0: no token is dropped
    block.router_z_loss_coef = 0.0
    block.router_aux_loss_coef = -1.0  # weight of the load balance; -1: the model's own
    # YaRN: the context that the model was trained on is stretched by this factor; 0: as it is
    block.yarn_factor = 0.0
    block.offload_moments = False  # keep Adam's moments in host memory
    return block


def lora() -> ml_collections.ConfigDict:
    """Return which low-rank adapters are trained in place of the weights (docs/lora.md)."""
    block = ml_collections.ConfigDict()
    block.rank = 0  # of each adapter; 0: none, all weights are trained
    block.alpha = 32.0  # an adapter's product is scaled by alpha / rank
    # comma-separated: all, attention, experts, mlp (layers without experts), or PEFT's names of
    # matrices, such as q_proj,v_proj
    block.targets = "all"
    # what engines get: the weights with the adapters added (merged), or the adapters alone, loaded
    # by name beside the weights that the engine was started with (adapter)
    block.publish = "merged"
    return block


def mesh() -> ml_collections.ConfigDict:
    """Return the sizes of the mesh axes: one device. One axis may be -1: all remaining devices."""
    return ml_collections.ConfigDict(
        {"replica": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    )


def engine() -> ml_collections.ConfigDict:
    """Return which inference engines sample: one embedded engine."""
    block = ml_collections.ConfigDict()
    # comma-separated URLs of SGLang servers; empty: embedded engines are started
    block.urls = ""
    block.count = 1  # embedded engines to start where `urls` is empty
    # of embedded engines. auto: a chip that the mesh leaves, else inside on a GPU or TPU, else the
    # CPU; cpu; share: a share of the trainer's GPU; inside: a thread of the trainer, in turn with
    # its updates (rome/train/devices.py)
    block.device = "auto"
    # inside: keep the engine's memory during updates; False frees it for them (its cache and its
    # copy of the weights)
    block.keep_memory = False
    # requests that an embedded engine runs at once
    block.slots = 64
    # tokens whose keys and values an embedded engine keeps, of running requests and of the prefixes
    # that later ones find; 0: slots * max_context
    block.cache_tokens = 0
    # for one answer of an engine, its queue included and publications of weights apart
    block.completion_seconds = 600.0
    # what a publication does to running requests: abort them, retract them (their caches are
    # computed anew with the new weights) or freeze them in_place (docs/engines.md)
    block.pause = "abort"
    # comma-separated URLs of launch.mirror, one an engine: weights travel to its host as deltas
    block.mirrors = ""
    return block


def sandbox() -> ml_collections.ConfigDict:
    """Return the sandbox of every episode (envs/rock/config.py)."""
    block = ml_collections.ConfigDict()
    # best_available: the strongest tier of this machine; required: refuse to run with a weaker one
    block.isolation = "best_available"
    block.memory_mb = 256
    block.pids = 64
    block.disk_mb = 0  # of workspace and /tmp together; 0: what the task needs
    # seconds of one command; 0: the environment's own (5 in the curriculum, 60 in task folders)
    block.command_timeout = 0.0
    # packages that the tests of task folders find and agents never see; read where it exists
    block.verifier_tools = "~/.rock/tools"
    # what agents may reach, as in "pypi.org:443 model@127.0.0.1:30000"; empty: no network
    block.egress = ""
    # embedded; docker: containers of `image`; remote: the ROCK admin at `url`, with the token from
    # the environment variable ROCK_TOKEN
    block.backend = "embedded"
    block.image = ""
    block.url = ""
    return block


def apply_games(config: ml_collections.ConfigDict) -> None:
    """Set two text games as tasks, and sizes that hold ten turns of a bare board each."""
    config.task = "0.5*gem:game/frozen_lake-bare + 0.5*gem:game/sokoban-bare"
    config.max_context = 352
    config.row_length = 352
    config.max_new_tokens = 8


def apply_mixture(config: ml_collections.ConfigDict) -> None:
    """Set terminal tasks and errands in a user interface, which take up to ten times the tokens."""
    config.model = "small"
    config.task = "0.7*terminal + 0.3*worlds:gui/easy"
    config.max_turns = 16
    config.max_context = 1792
    config.row_length = 1792
    config.chunks_per_row = 64
    config.rows_per_microbatch = 4


def apply_small(config: ml_collections.ConfigDict) -> None:
    """Set all families of the terminal curriculum, and a model of about 10 M active parameters.

    Four combined families stay unseen. The longest episodes of a few wide families do not fit.
    """
    config.model = "small_10m"
    config.task = "terminal:all"
    config.max_context = 640
    config.row_length = 640
    config.chunks_per_row = 24
    config.max_new_tokens = 192
    config.rows_per_microbatch = 8


def apply_pod_sizes(config: ml_collections.ConfigDict, preset: str) -> Pod:
    """Set model, tokenizer, mesh and rematerialisation for a pod; return the pod's entry."""
    pod = PODS[preset]
    config.model = preset
    config.tokenizer = pod.checkpoint
    config.rows_per_microbatch = pod.rows
    config.learner.remat = "full"
    config.mesh.update(pod.mesh)
    return pod


def unknown_preset(experiment: str, preset: str, more: tuple[str, ...] = ()) -> ValueError:
    """Return the error for a preset that an experiment file does not have."""
    known = ", ".join(("tiny", "smoke", *PODS, *more))
    return ValueError(f"{experiment} has no preset {preset!r}. Choose one of {known}.")
