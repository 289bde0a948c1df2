"""Errors that engines raise, apart from mistakes in the caller's arguments (ValueError).

EngineError
├── EngineDead        no answer at the URL
├── EngineFailed      answered with a failure of its own, or unlike an engine
├── EngineRefused     taken out of service while a request waited
├── EngineUnproven    answered with weights that were never verified
└── RequestRejected   the engine does not take this request; another one may
"""


class EngineError(RuntimeError):
    """An engine failed to do what it was asked; the message names its URL and a remedy."""


class EngineDead(EngineError):
    """No connection to the engine's URL succeeded for `dead_after_seconds`."""


class EngineFailed(EngineError):
    """The engine answered with a failure of its own, or with what no engine should answer.

    It said 5xx, sent something other than JSON, left out a field or gave a logprob that is not
    finite. The request is not to blame, so another engine may continue it.
    """


class EngineRefused(EngineError):
    """The engine was taken out of service while a request waited for it.

    Another engine may continue the request.
    """


class EngineUnproven(EngineError):
    """The engine answered with weights that were never verified there.

    It was restarted, or another program changed its weights.
    """


class RequestRejected(EngineError):
    """The engine does not take this request: it said 4xx, or lacks a feature that was asked for.

    If another engine takes it, this engine is unlike the others; otherwise the request is wrong.
    """
