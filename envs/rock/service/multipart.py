"""Requests with files: a multipart body of one JSON part and then the files."""

from typing import Any

import aiohttp
from aiohttp import web

from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.errors import Refusal
from envs.rock.wire.fields import parse_json
from envs.rock.wire.operations import MAX_FILES_BYTES, MAX_JSON_BYTES

# what aiohttp raises for malformed bodies
_MALFORMED = (
    AssertionError,
    RuntimeError,
    aiohttp.ClientError,
    aiohttp.http_exceptions.HttpProcessingError,
)


async def read_parts(request: web.Request) -> tuple[Any, list[bytes]]:
    """Return the parsed JSON of the part "request", and the contents of the parts "file".

    Raises:
      ValueError: the body is malformed.
      Refusal: it exceeds MAX_JSON_BYTES or MAX_FILES_BYTES.
    """
    given = None
    files: list[bytes] = []
    left = MAX_FILES_BYTES
    try:
        reader = await request.multipart()
        async for part in reader:
            if not isinstance(part, aiohttp.BodyPartReader) or part.name not in ("request", "file"):
                raise ValueError('the parts are one "request" and then "file"s')
            if part.name == "request":
                given = parse_json(await _read_part(part, MAX_JSON_BYTES))
            else:
                content = await _read_part(part, left)
                files.append(content)
                left -= len(content)
    except _MALFORMED as error:
        raise ValueError(f"the multipart body is malformed: {type(error).__name__}") from None
    return given, files


async def _read_part(part: aiohttp.BodyPartReader, limit: int) -> bytes:
    data = bytearray()
    while piece := await part.read_chunk(PIECE_BYTES):
        data += piece
        if len(data) > limit:
            raise Refusal(
                "too_large",
                f"a request has at most {MAX_JSON_BYTES} bytes and its files {MAX_FILES_BYTES}",
            )
    return bytes(data)
