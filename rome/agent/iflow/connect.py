"""Finds the model that the user's flags and settings name."""

from __future__ import annotations

from rome.agent.endpoint import ChatEndpoint
from rome.agent.iflow import events
from rome.agent.iflow.models.endpoint_model import EndpointModel
from rome.agent.iflow.models.engine_model import connect_engine
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.options import Options, UsageError
from rome.agent.iflow.sessions import OpenSession
from rome.agent.iflow.specs.settings import Settings

TOKENS = "trajectory.json"  # in the session's folder, where an engine of token ids answers
REQUEST_SECONDS = 1800.0  # for one answer of a model, with its retries
MAX_REQUESTS = 6


async def connect_model(options: Options, settings: Settings, session: OpenSession) -> Model:
    """Return the model of a session, once its server has answered.

    Raises:
      UsageError: no server is named.
      ModelError: it is not there.
    """
    if options.engine:
        said = [one.chunk for one in session.log.events if isinstance(one, events.AssistantMessage)]
        return await connect_engine(
            options.engine,
            tokenizer=options.tokenizer,
            api_key=options.api_key or settings.api_key,
            context_tokens=options.context_tokens or settings.tokens_limit,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            tokens=session.folder / TOKENS,
            answered=max(said, default=-1) + 1,
        )
    base_url = options.base_url or settings.base_url
    if not base_url:
        raise UsageError(
            "no model: give the URL of an OpenAI-compatible server by --base_url, by baseUrl in"
            " ~/.iflow/settings.json or by IFLOW_baseUrl, such as http://127.0.0.1:8000/v1"
        )
    model = endpoint_model(options, settings, options.model or settings.model)
    try:
        await model.connect()
    except BaseException:
        await model.aclose()
        raise
    return model


def endpoint_model(options: Options, settings: Settings, name: str) -> EndpointModel:
    """Return a model of the endpoint by its name, without asking for it.

    Raises:
      UsageError: the endpoint's URL is none.
    """
    try:
        endpoint = ChatEndpoint(
            options.base_url or settings.base_url,
            name,
            options.api_key or settings.api_key or None,
            request_seconds=REQUEST_SECONDS,
            max_requests=MAX_REQUESTS,
        )
    except ValueError as error:
        raise UsageError(f"--base_url: {error}") from error
    return EndpointModel(
        endpoint,
        context_tokens=options.context_tokens or settings.tokens_limit,
        max_tokens=options.max_tokens or None,
        temperature=options.temperature,
        prices=options.prices,
    )
