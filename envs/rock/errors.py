"""The errors that a sandbox raises.

    SandboxError
    ├── IsolationError
    ├── SandboxStartError
    ├── SandboxClosedError
    ├── SandboxFileError
    └── ImageError

All of them except SandboxFileError are faults of the infrastructure, never of a command.
"""


class SandboxError(Exception):
    """The sandbox could not do its work. Mask the episode that it served; do not score it."""

    code: str | None = None  # set when a ROCK service reported the error: one of wire.errors.CODES


class IsolationError(SandboxError):
    """This machine cannot give the isolation that the config asks for."""


class SandboxStartError(SandboxError):
    """A sandbox, or a command's process in it, could not be started."""


class SandboxClosedError(SandboxError):
    """The sandbox was not started, was stopped, or its process died."""


class SandboxFileError(SandboxError):
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
