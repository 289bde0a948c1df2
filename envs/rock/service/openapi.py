"""The OpenAPI document of a service, written from the table that its requests are checked by."""

from collections.abc import Mapping
from typing import Any

from envs.rock.wire.api import CODES, CONFIG, KINDS, Field, Operation

OCTETS = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def document(
    title: str, operations: Mapping[str, Operation], more: Mapping[str, Any]
) -> dict[str, Any]:
    """more: items of paths that are not in the table."""
    paths: dict[str, Any] = {
        operation.path: {operation.method.lower(): _operation(name, operation)}
        for name, operation in operations.items()
    }
    for path, says, kind in (
        ("/health", "Whether it is up.", "application/json"),
        ("/openapi.json", "This document.", "application/json"),
        ("/metrics", "Prometheus' text format.", "text/plain"),
    ):
        paths[path] = {
            "get": {
                "operationId": path.strip("/").partition(".")[0],
                "summary": says,
                "responses": {"200": {"description": "OK", "content": {kind: {}}}},
            }
            | ({"security": []} if path != "/metrics" else {})
        }
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": "1"},
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths | dict(more),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "schemas": {
                "Config": schema(CONFIG),
                "Error": {
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
                },
            },
            "responses": {
                "Error": {
                    "description": "Refused or failed; `code` says why.",
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
                    },
                }
            },
        },
    }


def _operation(name: str, operation: Operation) -> dict[str, Any]:
    told = {
        "operationId": name.replace("/", "_"),
        "summary": operation.says,
        "responses": {
            "101" if operation.shape == "connect" else "200": (
                {"description": operation.answers}
                | (
                    {}
                    if operation.shape == "connect"
                    else {
                        "content": (
                            OCTETS
                            if operation.shape == "read"
                            else {"application/json": {"schema": {"type": "object"}}}
                        )
                    }
                )
            ),
            **(
                {"202": {"description": "Not finished: the same request again joins it."}}
                if "wait" in operation.fields and "call" in operation.fields
                else {}
            ),
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if operation.shape == "json":
        request = schema(operation.fields)
        content: dict[str, Any] = {"application/json": {"schema": request}}
        if operation.takes_files:
            content["multipart/form-data"] = {
                "schema": {
                    "type": "object",
                    "required": ["request"],
                    "properties": {
                        "request": request,
                        "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        return told | {
            "requestBody": {
                "required": any(field.required for field in operation.fields.values()),
                "content": content,
            }
        }
    told["parameters"] = [
        {
            "name": name,
            "in": "query",
            "required": field.required,
            "description": field.says,
            "schema": _field(name, field),
        }
        for name, field in operation.fields.items()
    ]
    return told | (
        {"requestBody": {"required": True, "content": OCTETS}} if operation.shape == "write" else {}
    )


def schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    told = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _field(name, field) for name, field in fields.items()},
    }
    required = [name for name, field in fields.items() if field.required]
    return told | ({"required": required} if required else {})


def _field(name: str, field: Field) -> dict[str, Any]:
    if name == "config":
        return {"$ref": "#/components/schemas/Config"}
    names = {
        "string": ("minLength", "maxLength"),
        "integer": ("minimum", "maximum"),
        "number": ("minimum", "maximum"),
        "strings": ("minItems", "maxItems"),
        "map": ("minProperties", "maxProperties"),
        "object": ("minProperties", "maxProperties"),
    }.get(field.kind)
    return (
        KINDS[field.kind]
        | {"description": field.says}
        | (dict(zip(names, (field.low, field.high))) if names else {})
    )
