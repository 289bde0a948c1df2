"""The errors that a sandbox raises.

    SandboxError
    ├── AgentFault
    │   ├── SandboxFileError
    │   └── SessionEndedError (a SandboxClosedError, too)
    ├── IsolationError
    ├── SandboxStartError
    ├── SandboxClosedError
    └── ImageError

An AgentFault is what programs in the sandbox can bring about. Once an agent has acted there, it is
the agent's failure. All others are faults of the infrastructure, never of a command.
"""


class SandboxError(Exception):
    """The sandbox could not do its work. Mask the episode that it served; do not score it."""

    code: str | None = None  # set when a ROCK service reported the error: one of wire.errors.CODES


class AgentFault(SandboxError):
    """The sandbox could not do its work because of what ran in it, or could have been.

    Processes that take too long to die, memory or a disk that is full, a tree that is too deep: an
    agent can make them, so an episode that it meets ends as the agent's failure, with reward 0. If
    such an episode were masked, an agent could choose which of its failures count.
    """


class IsolationError(SandboxError):
    """This machine cannot give the isolation that the config asks for."""


class SandboxStartError(SandboxError):
    """A sandbox, or a command's process in it, could not be started."""


class SandboxClosedError(SandboxError):
    """The sandbox was not started, was stopped, or its process died."""


class SessionEndedError(AgentFault, SandboxClosedError):
    """A session's shell has ended, by a command of its own; the sandbox lives on."""


class SandboxFileError(AgentFault):
    """A file could not be read or written.

    Attributes:
      reason: one of REASONS.
    """

    REASONS = ("missing", "outside", "not_regular", "too_large", "no_space", "denied")

    def __init__(self, reason: str, message: str):
        if reason not in self.REASONS:
            raise ValueError(f"reason {reason!r} is not one of {self.REASONS}")
        super().__init__(message)
        self.reason = reason


class ImageError(SandboxError):
    """An image could not be built.

    Attributes:
      log: the end of the build's output.
    """

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log
