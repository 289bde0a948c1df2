"""ROCK: sandboxes in which agents run shell commands. `from envs.rock import Sandbox, SandboxConfig`."""

from envs.rock.config import CommandResult, SandboxConfig
from envs.rock.errors import IsolationError, SandboxClosedError, SandboxError, SandboxFileError, SandboxStartError
from envs.rock.tiers import TierReport, probe
from envs.rock.sandbox import Sandbox

__all__ = ["CommandResult", "IsolationError", "Sandbox", "SandboxClosedError", "SandboxConfig", "SandboxError", "SandboxFileError",
           "SandboxStartError", "TierReport", "probe"]
