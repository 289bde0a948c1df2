"""The OpenAPI document of a service, written from the table that its requests are checked by."""

from collections.abc import Mapping
from typing import Any

from envs.rock.wire.codec import CONFIG
from envs.rock.wire.errors import CODES
from envs.rock.wire.fields import KINDS, Field
from envs.rock.wire.operations import Operation

BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
# the members of a JSON schema that bound a value of each kind, if any
_BOUNDS = {
    "string": ("minLength", "maxLength"),
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "strings": ("minItems", "maxItems"),
    "map": ("minProperties", "maxProperties"),
    "object": ("minProperties", "maxProperties"),
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "enum": list(CODES)},
                "message": {"type": "string"},
                "reason": {"type": "string"},
            },
        }
    },
}


def document(title: str, operations: Mapping[str, Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.0 document of a service.

    Args:
      title: name of the service.
      operations: its table of operations, by name.
    """
    paths: dict[str, Any] = {}
    for name, operation in operations.items():
        paths[operation.path] = {operation.method.lower(): _operation(name, operation)}
    paths["/health"] = _own_route("health", "Whether it is up.", "application/json")
    paths["/openapi.json"] = _own_route("openapi", "This document.", "application/json")
    paths["/metrics"] = _own_route(
        "metrics", "Prometheus' text format.", "text/plain", is_public=False
    )
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": "1"},
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths,
        "components": _components(),
    }


def _own_route(
    operation_id: str, summary: str, content_type: str, is_public: bool = True
) -> dict[str, Any]:
    response = {"description": "OK", "content": {content_type: {}}}
    item: dict[str, Any] = {
        "operationId": operation_id,
        "summary": summary,
        "responses": {"200": response},
    }
    if is_public:
        item["security"] = []
    return {"get": item}


def _components() -> dict[str, Any]:
    error_content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        },
        "schemas": {"Config": schema(CONFIG), "Error": _ERROR_SCHEMA},
        "responses": {
            "Error": {
                "description": "Refused or failed; `code` says why.",
                "content": error_content,
            }
        },
    }


def _operation(name: str, operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": name.replace("/", "_"),
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    if operation.shape == "json":
        described["requestBody"] = _json_body(operation)
        return described
    described["parameters"] = [
        {
            "name": name,
            "in": "query",
            "required": field.required,
            "description": field.description,
            "schema": _field(name, field),
        }
        for name, field in operation.fields.items()
    ]
    if operation.shape == "write":
        described["requestBody"] = {"required": True, "content": BYTES}
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": operation.response}
    if operation.shape == "read":
        success["content"] = BYTES
    elif operation.shape != "connect":
        success["content"] = {"application/json": {"schema": {"type": "object"}}}
    responses = {"101" if operation.shape == "connect" else "200": success}
    if "wait" in operation.fields and "call" in operation.fields:
        responses["202"] = {"description": "Not finished: the same request again joins it."}
    responses["default"] = {"$ref": "#/components/responses/Error"}
    return responses


def _json_body(operation: Operation) -> dict[str, Any]:
    request = schema(operation.fields)
    content: dict[str, Any] = {"application/json": {"schema": request}}
    if operation.takes_files:
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "required": ["request"],
                "properties": {"request": request, "file": _FILES},
            }
        }
    is_required = any(field.required for field in operation.fields.values())
    return {"required": is_required, "content": content}


def schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the JSON schema of an object with these members and no others."""
    described: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _field(name, field) for name, field in fields.items()},
    }
    required = [name for name, field in fields.items() if field.required]
    if required:
        described["required"] = required
    return described


def _field(name: str, field: Field) -> dict[str, Any]:
    if name == "config":
        return {"$ref": "#/components/schemas/Config"}
    described: dict[str, Any] = KINDS[field.kind] | {"description": field.description}
    if field.kind in _BOUNDS:
        low, high = _BOUNDS[field.kind]
        described |= {low: field.low, high: field.high}
    return described
