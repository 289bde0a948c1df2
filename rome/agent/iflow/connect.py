"""Finds the model that the user's flags and settings name."""

from __future__ import annotations

from rome.agent.endpoint import ChatEndpoint
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.models.endpoint_model import EndpointModel
from rome.agent.iflow.models.engine_model import connect_engine
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.options import Options, UsageError
from rome.agent.iflow.sessions import OpenSession

TOKENS = "trajectory.json"  # in the session's folder, where an engine of token ids answers
REQUEST_SECONDS = 1800.0  # for one answer of a model, with its retries
MAX_REQUESTS = 6


async def connect_model(options: Options, session: OpenSession) -> Model:
    """Return the model of a session, once its server has answered; ModelError if it does not."""
    if options.engine:
        said = [one.chunk for one in session.log.events if isinstance(one, AssistantMessage)]
        answered = max(said, default=-1) + 1
        return await connect_engine(options, tokens=session.folder / TOKENS, answered=answered)
    if not options.base_url:
        raise UsageError(
            "no model: give the URL of an OpenAI-compatible server by --base_url, by baseUrl in"
            " ~/.iflow/settings.json or by IFLOW_baseUrl, such as http://127.0.0.1:8000/v1"
        )
    model = endpoint_model(options, options.model)
    try:
        await model.connect()
    except BaseException:
        await model.aclose()
        raise
    return model


def endpoint_model(options: Options, name: str) -> EndpointModel:
    """Return a model of the endpoint by its name, without asking for it."""
    try:
        endpoint = ChatEndpoint(
            options.base_url,
            name,
            options.api_key or None,
            request_seconds=REQUEST_SECONDS,
            max_requests=MAX_REQUESTS,
        )
    except ValueError as error:
        raise UsageError(f"--base_url: {error}") from error
    return EndpointModel(
        endpoint,
        context_tokens=options.context_tokens,
        max_tokens=options.max_tokens or None,
        temperature=options.temperature,
        prices=options.prices,
    )
