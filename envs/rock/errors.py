"""The closed set of errors a sandbox raises.

All of them are infrastructure's fault, never the command's, but SandboxFileError.
"""


class SandboxError(Exception):
    """The sandbox could not do its work; the episode it served is to be masked, not scored."""

    code: str | None = None  # set when a ROCK service reported the error: one of wire.errors.CODES


class IsolationError(SandboxError):
    """This machine cannot give the isolation that was asked for."""


class SandboxStartError(SandboxError):
    """A sandbox, or a command's process in it, could not be started."""


class SandboxClosedError(SandboxError):
    """The sandbox is stopped, was never started, or its process died."""


class SandboxFileError(SandboxError):
    """A file could not be read or written. `reason` is one of REASONS."""

    REASONS = ("missing", "outside", "not_regular", "too_large", "no_space", "denied")

    def __init__(self, reason: str, message: str):
        if reason not in self.REASONS:
            raise ValueError(f"reason {reason!r} is not one of {self.REASONS}")
        super().__init__(message)
        self.reason = reason


class ImageError(SandboxError):
    """An image could not be built. `log` is the end of what the build said."""

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log
