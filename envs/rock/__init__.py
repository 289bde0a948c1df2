"""ROCK: sandboxes in which agents run shell commands.

`from envs.rock import Sandbox, SandboxConfig`.
"""

from envs.rock.backend import Job, Session, Snapshot
from envs.rock.config import Address, CommandResult, Denial, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.embedded.probe import probe
from envs.rock.errors import (
    AgentFault,
    IsolationError,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
    SessionEndedError,
)
from envs.rock.sandbox import Sandbox
from envs.rock.sync import SyncSandbox
from envs.rock.tiers import TierReport
from envs.rock.transfer import Transfer

__all__ = [
    "Address",
    "AgentFault",
    "CommandResult",
    "Denial",
    "FileEntry",
    "IsolationError",
    "Job",
    "Sandbox",
    "SandboxClosedError",
    "SandboxConfig",
    "SandboxError",
    "SandboxFileError",
    "SandboxStartError",
    "SandboxStatus",
    "Session",
    "SessionEndedError",
    "Snapshot",
    "SyncSandbox",
    "TierReport",
    "Transfer",
    "probe",
]
