"""Errors that engines raise, apart from mistakes in the caller's arguments (ValueError).

EngineError
├── EngineDead        no answer at the URL
├── EngineRefused     taken out of service while a request waited
└── EngineUnproven    answered with weights that were never verified
"""


class EngineError(RuntimeError):
    """An engine failed to do what it was asked; the message names its URL and a remedy."""


class EngineDead(EngineError):
    """No connection to the engine's URL succeeded for `dead_after_seconds`."""


class EngineRefused(EngineError):
    """The engine was taken out of service while a request waited for it.

    Another engine may continue the request.
    """


class EngineUnproven(EngineError):
    """The engine answered with weights that were never verified there.

    It was restarted, or another program changed its weights.
    """
