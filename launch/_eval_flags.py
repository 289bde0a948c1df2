"""The flags of launch.eval, and what they say: settings of tasks, sandboxes and agents."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:  # heavy modules are imported once the flags are checked
    from envs.rock import SandboxConfig
    from envs.sources import Settings, Task
    from rome.agent.command import CommandAgent
    from rome.agent.iflow.episode import IFlowAgent

AGENTS = ("oracle", "noop", "cheat", "attacker", "refuse", "policy", "iflow", "endpoint")
IFLOW = "iflow"  # plays the policy's episodes in the place of the project's plain loop
COMMAND = "command"  # and a colon: the command of an agent that plays the policy's episodes
PLAYERS = ("policy", IFLOW, COMMAND)  # of a checkpoint's episodes

DATASET = flags.DEFINE_string(
    "dataset",
    None,
    "A folder of Harbor or Terminal-Bench tasks; a registry (FILE.json[:NAME[@VERSION]]); a"
    " .parquet, .jsonl or .json file of SWE-bench instances or of archived tasks; harbor,"
    " harbor/TASK, terminal[:FAMILIES[:N]], repair[:PACKAGES[:N]], worlds[:NAMES[:N]],"
    " problems[:NAMES[:N]], games[:NAMES[:N]] or bfcl:FILE.",
    required=True,
)
FETCH = flags.DEFINE_bool(
    "fetch",
    False,
    "Let git fetch the repositories that a registry names; they are kept in .cache/datasets.",
)
OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
AGENT = flags.DEFINE_string(
    "agent",
    "oracle",
    f"The agent that plays: {', '.join(AGENTS)}, or command:COMMAND, which plays the policy's"
    " episodes in the sandbox of each task, in the place of the project's own loop.",
)
AGENT_FILES = flags.DEFINE_string(
    "agent_files", "", "command: a folder that is copied into each sandbox, as $AGENT_FILES."
)
AGENT_IDLE_SECONDS = flags.DEFINE_float(
    "agent_idle_seconds",
    None,
    "command: seconds without a call of the model after which it is ended. Default: 120.",
    lower_bound=1.0,
)
IFLOW_TOOLS = flags.DEFINE_string(
    "iflow_tools", "", 'iflow: tools of its own beside those of the environment, as in "task".'
)
IFLOW_COMPACTION = flags.DEFINE_float(
    "iflow_compaction",
    None,
    "iflow: share of a context at which it is summarised. Default: never.",
    lower_bound=0.01,
    upper_bound=0.99,
)
ATTEMPTS = flags.DEFINE_integer(
    "attempts",
    None,
    "Attempts at each task. Default: 1; one of each cheat; with --validate 3 of the oracle.",
    lower_bound=1,
)
CONCURRENCY = flags.DEFINE_integer("concurrency", 4, "Attempts at once.", lower_bound=1)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of sampling, and of generated instances.", lower_bound=0
)
ISOLATION = flags.DEFINE_enum(
    "isolation", "best_available", ("required", "best_available"), "Isolation of the sandboxes."
)
DOCKER_IMAGE = flags.DEFINE_string(
    "docker_image",
    "",
    "Play in containers of this machine's Docker engine, where Harbor tasks have their real"
    " Dockerfile built; the image is for tasks that name none. Default: embedded sandboxes.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "policy, iflow, command: a Hugging Face directory. With --engines only its tokenizer and config"
    " are read.",
)
ENGINES = flags.DEFINE_string(
    "engines",
    "",
    "policy, iflow, command: URLs of SGLang servers with commas between them. Default: an embedded"
    " engine is started.",
)
MAX_CONTEXT = flags.DEFINE_integer(
    "max_context",
    None,
    "policy, iflow, command: tokens of a context. Default: what the model was made for, at most"
    " 4096.",
    lower_bound=2,
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Tokens of one turn. Default: policy and command 512; endpoint: its own limit.",
    lower_bound=1,
)
TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "Temperature of sampling. Default: policy and command 1; endpoint: its own.",
    lower_bound=0.0,
)
EPISODE_SECONDS = flags.DEFINE_float(
    "episode_seconds", 600.0, "Limit for one attempt of an agent with a model.", lower_bound=1.0
)
ENDPOINT = flags.DEFINE_string(
    "endpoint",
    "",
    "endpoint, command: URL of an OpenAI-compatible server, up to and with /v1. With a command it"
    " answers in the place of the policy, and the checkpoint's tokenizer writes the record.",
)
MODEL = flags.DEFINE_string("model", "", "endpoint, command: name of the model.")
API_KEY_ENV = flags.DEFINE_string(
    "api_key_env", "OPENAI_API_KEY", "endpoint: the environment variable that holds the key."
)
STANDS_FOR = flags.DEFINE_multi_string(
    "stands_for",
    [],
    "IMAGE=PROGRAM,PROGRAM: a base image that cannot be had; this machine's system stands for it,"
    " if it has these programs.",
)
BUILD_EGRESS = flags.DEFINE_multi_string(
    "build_egress",
    None,
    "HOST:PORT that the steps of a task's build may reach, but not its agent and tests; none:"
    " nothing. Default: for containers the whole network, for embedded sandboxes what the task"
    " grants.",
)
TASK_ENV = flags.DEFINE_multi_string(
    "task_env",
    [],
    "NAME=VALUE, or NAME for the value of this process's own variable: what ${NAME} in the env"
    " tables of Harbor tasks stands for. No other variable is passed on, and none is recorded.",
)
VERIFIER_TOOLS = flags.DEFINE_string(
    "verifier_tools",
    "~/.rock/tools",
    "Folder of Python packages that the tests of task folders find and agents never see, made by"
    " `pip install --target FOLDER pytest ...`. Read where it exists.",
)
VERIFIER_EGRESS = flags.DEFINE_multi_string(
    "verifier_egress",
    [],
    "HOST:PORT that the tests of task folders may reach, but not their agent: what they install is"
    " installed then, and --verifier_tools need not have it.",
)
MAX_TURNS = flags.DEFINE_integer(
    "max_turns",
    None,
    "Turns of an agent, in each step of a task folder. Default: the environment's own; 40 in task"
    " folders. Of a command: its calls of the model in all; default 1000.",
    lower_bound=1,
)
COMMAND_SECONDS = flags.DEFINE_float(
    "command_seconds",
    None,
    "Limit for one command in a sandbox. Default: the environment's own; 60 in task folders.",
    lower_bound=0.1,
)
TIMEOUT_MULTIPLIER = flags.DEFINE_float(
    "timeout_multiplier", 1.0, "Of every time limit that a task folder sets.", lower_bound=0.01
)
MEMORY_MB = flags.DEFINE_integer(
    "memory_mb", None, "Memory of a sandbox. Default: what the task asks for.", lower_bound=16
)
DISK_MB = flags.DEFINE_integer(
    "disk_mb",
    None,
    "Disk of a sandbox, which is part of its memory. Default: what the task asks for, at most half"
    " of its memory.",
    lower_bound=1,
)
VALIDATE = flags.DEFINE_bool("validate", False, "Prove the dataset: oracle 1, no-op 0, cheats 0.")
DECONTAMINATE = flags.DEFINE_string(
    "decontaminate", "", "A folder of text: report which tasks stand in it."
)


# -- what the flags say
# -------------------------------------------------------------------------------------------------


def check_flags() -> None:
    """Raise ValueError for flags that exclude each other, are missing, or would not be read."""
    if VALIDATE.value and DECONTAMINATE.value:
        raise ValueError("--validate and --decontaminate are two jobs; give one of them")
    if AGENT.value not in AGENTS and not AGENT.value.startswith(f"{COMMAND}:"):
        raise ValueError(
            f"--agent {AGENT.value!r} is unknown; choose {', '.join(AGENTS)} or command:COMMAND"
        )
    player = playing_agent()
    readers = {
        (COMMAND,): (AGENT_FILES, AGENT_IDLE_SECONDS),
        (IFLOW,): (IFLOW_TOOLS, IFLOW_COMPACTION),
        PLAYERS: (CHECKPOINT, ENGINES, MAX_CONTEXT),
        ("endpoint", COMMAND): (ENDPOINT, MODEL),
        (*PLAYERS, "endpoint"): (MAX_TOKENS, TEMPERATURE),
    }
    for agents, read_flags in readers.items():
        for flag in read_flags:
            if flag.value not in (None, "") and player not in agents:
                reader = f"--agent {player}" if player else "--validate or --decontaminate"
                raise ValueError(f"--{flag.name} is not read by {reader}; leave it out")
    if player in PLAYERS and not CHECKPOINT.value:
        raise ValueError(
            f"--agent {player} needs --checkpoint, a Hugging Face directory; with --engines its"
            " tokenizer is read"
        )
    if player == "endpoint" or ENDPOINT.value or MODEL.value:
        if not (ENDPOINT.value and MODEL.value):
            raise ValueError(f"--agent {player} needs both --endpoint URL and --model NAME")
        for flag in (ENGINES, MAX_CONTEXT):
            if flag.value:
                raise ValueError(
                    f"--{flag.name} is not read where --endpoint answers; leave it out"
                )

    command_agent()
    iflow_agent()


def playing_agent() -> str:
    """Return the agent whose flags count, by its name; "" for a job that chooses its agents."""
    if VALIDATE.value or DECONTAMINATE.value:
        return ""
    return AGENT.value.partition(":")[0]


def command_agent() -> CommandAgent | None:
    """Return the command that plays; None where another agent does.

    Raises:
      CommandError: it cannot.
    """
    if playing_agent() != COMMAND:
        return None
    from rome.agent.command import CommandAgent
    from rome.agent.proxy import Budget

    _, _, command = AGENT.value.partition(":")
    budget = Budget(calls=MAX_TURNS.value) if MAX_TURNS.value else Budget()
    idle_seconds = AGENT_IDLE_SECONDS.value or CommandAgent.idle_seconds
    return CommandAgent(command, AGENT_FILES.value, idle_seconds, budget)


def iflow_agent() -> IFlowAgent | None:
    """Return the iFlow agent that plays; None where another agent does.

    Raises:
      IFlowError: it cannot with these flags.
    """
    if playing_agent() != IFLOW:
        return None
    from rome.agent.iflow.episode import IFlowAgent

    tools = tuple(IFLOW_TOOLS.value.split())
    return IFlowAgent(tools, IFLOW_COMPACTION.value or 0.0)


def check_command(isolation: str, tasks: Sequence[Task]) -> None:
    """Raise ValueError where a command is to play and cannot.

    Args:
      isolation: tier of the sandboxes.
      tasks: to be played. Those of a family are alike.
    """
    if playing_agent() != COMMAND:
        return
    from rome.agent.command import runs_commands

    if isolation == "landlock":
        raise ValueError(
            "--agent command asks the policy at a door of its sandbox, and the landlock tier of"
            " this machine has none; use --agent policy, or a machine with user namespaces (python"
            " -m launch.doctor)"
        )
    for task in {(task.source, task.family): task for task in tasks}.values():
        if not runs_commands(task.make_env(sandbox_config())):
            raise ValueError(
                f"--agent command needs tasks with a sandbox, and {task.name!r} of the dataset has"
                " none; choose tasks of terminal, harbor, repair or SWE-bench"
            )


def read_alias(text: str) -> tuple[str, tuple[str, ...]]:
    """Return IMAGE=PROGRAM,PROGRAM as (image, programs)."""
    image, equals, programs = text.partition("=")
    if not image or not equals:
        raise ValueError(
            f"--stands_for={text!r} is not IMAGE=PROGRAM,PROGRAM, such as"
            " python:3.13-slim=python3,pip"
        )
    return image, tuple(program for program in programs.split(",") if program)


def read_build_egress() -> tuple[str, ...] | None:
    """Return the hosts of --build_egress; None for the default."""
    from envs.rock.config import parse_grant

    if BUILD_EGRESS.value is None:
        return None
    if BUILD_EGRESS.value == ["none"]:
        return ()
    for grant in BUILD_EGRESS.value:
        parse_grant(grant)
    return tuple(BUILD_EGRESS.value)


def read_task_env() -> dict[str, str]:
    """Return the variables of --task_env."""
    variables = {}
    for given in TASK_ENV.value:
        name, equals, value = given.partition("=")
        if not equals and name not in os.environ:
            raise ValueError(
                f"--task_env {name}: there is no such variable here; set it, or give its value as"
                f" --task_env {name}=VALUE"
            )
        variables[name] = value if equals else os.environ[name]
    return variables


def play_settings() -> Settings:
    """Return how the tasks are played."""
    from envs.rock.config import parse_grant
    from envs.sources import Settings

    for grant in VERIFIER_EGRESS.value:
        parse_grant(grant)
    return Settings(
        images=dict(map(read_alias, STANDS_FOR.value)),
        build_egress=read_build_egress(),
        verifier_egress=tuple(VERIFIER_EGRESS.value),
        environ=read_task_env(),
        fetch=FETCH.value,
        max_turns=MAX_TURNS.value or 0,
        command_timeout=COMMAND_SECONDS.value or 0.0,
        timeout_multiplier=TIMEOUT_MULTIPLIER.value,
    )


def agent_settings() -> dict[str, Any]:
    """Return the flags that make the results of an agent with a model its own."""
    limits = {
        "temperature": TEMPERATURE.value,
        "max_tokens": MAX_TOKENS.value,
        "episode_seconds": EPISODE_SECONDS.value,
    }
    if playing_agent() in PLAYERS:
        from rome.evals.policy import checkpoint_digest

        folder = pathlib.Path(CHECKPOINT.value)
        return {
            **command_settings(),
            **iflow_settings(),
            **({"endpoint": ENDPOINT.value, "model": MODEL.value} if ENDPOINT.value else {}),
            "checkpoint": str(folder.resolve()),
            "checkpoint_files": checkpoint_digest(folder),
            "engines": ENGINES.value,
            **limits,
            "max_context": MAX_CONTEXT.value,
        }
    if playing_agent() == "endpoint":
        return {"endpoint": ENDPOINT.value, "model": MODEL.value, **limits}
    return {}


def command_settings() -> dict[str, Any]:
    """Return what makes the results of a command its own; {} where none plays."""
    agent = command_agent()
    if agent is None:
        return {}
    from rome.evals.policy import files_digest

    return {
        "command": agent.command,
        "agent_files": agent.files,
        "agent_files_digest": files_digest(pathlib.Path(agent.files)) if agent.files else "",
        "agent_idle_seconds": agent.idle_seconds,
    }


def iflow_settings() -> dict[str, Any]:
    """Return what makes the results of the iFlow agent its own; {} where it does not play."""
    agent = iflow_agent()
    if agent is None:
        return {}
    return {"iflow_tools": list(agent.tools), "iflow_compaction": agent.compaction}


def sandbox_settings() -> dict[str, Any]:
    """Return the tier of the sandboxes, and the image of containers."""
    from rome.stages.isolation import find_isolation

    settings = {"isolation": find_isolation(sandbox_config())}
    # What is not given is not written, so that folders of earlier versions are gone on with.
    given = (
        STANDS_FOR,
        BUILD_EGRESS,
        VERIFIER_EGRESS,
        MEMORY_MB,
        DISK_MB,
        DOCKER_IMAGE,
        MAX_TURNS,
        COMMAND_SECONDS,
    )
    for flag in given:
        if flag.value:
            settings[flag.name] = flag.value
    if TIMEOUT_MULTIPLIER.value != TIMEOUT_MULTIPLIER.default:
        settings[TIMEOUT_MULTIPLIER.name] = TIMEOUT_MULTIPLIER.value
    return settings


def sandbox_config() -> SandboxConfig:
    """Return the config of every sandbox."""
    from envs.rock import SandboxConfig

    fields: dict[str, Any] = {"isolation": ISOLATION.value}
    if DOCKER_IMAGE.value:
        fields |= {"backend": "docker", "image": DOCKER_IMAGE.value}
    if MEMORY_MB.value:
        fields["memory_mb"] = MEMORY_MB.value
    if DISK_MB.value:
        fields["disk_mb"] = DISK_MB.value
    tools = pathlib.Path(VERIFIER_TOOLS.value).expanduser()
    if VERIFIER_TOOLS.value and tools.is_dir():
        fields["verifier_tools"] = str(tools)
    elif VERIFIER_TOOLS.present:
        raise ValueError(
            f"--verifier_tools={VERIFIER_TOOLS.value} is no folder; make it by"
            f" `pip install --target {VERIFIER_TOOLS.value} pytest`"
        )
    return SandboxConfig(**fields)
