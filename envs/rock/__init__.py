"""ROCK: sandboxes in which agents run shell commands. `from envs.rock import Sandbox, SandboxConfig`."""

from envs.rock.commands import Job, Session
from envs.rock.config import CommandResult, SandboxConfig, SandboxStatus
from envs.rock.errors import IsolationError, SandboxClosedError, SandboxError, SandboxFileError, SandboxStartError
from envs.rock.tiers import TierReport, probe
from envs.rock.sandbox import Sandbox, Snapshot

__all__ = ["CommandResult", "IsolationError", "Job", "Sandbox", "SandboxClosedError", "SandboxConfig", "SandboxError", "SandboxFileError",
           "SandboxStartError", "SandboxStatus", "Session", "Snapshot", "TierReport", "probe"]
