"""Errors of the host processes."""


class AgentError(OSError):
    """A holder could not do its work because of what ran in its sandbox, or could have been.

    The manager raises it as envs.rock.errors.AgentFault.
    """
