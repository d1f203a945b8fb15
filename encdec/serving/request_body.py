"""The body of a request: an object of JSON, and its fields by type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that gets an error instead of an answer, in OpenAI's shape.

    Attributes:
        status: of HTTP.
        message: the fault and the remedy.
        kind: OpenAI's ``type``.
        param: the field at fault.
        code: machine-readable reason.
        headers: additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def read_body(body: bytes) -> dict[str, Any]:
    """The fields of a body that are not null.

    Raises:
        ApiError: it is not a JSON object.
    """
    try:
        values = json.loads(body, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is {kind_of(values)}; expected an object")
    return {name: value for name, value in values.items() if value is not None}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ApiError for a name that comes twice, of which one would be lost."""
    names = [name for name, _ in pairs]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"the body has {double!r} twice; give each name once", param=double)
    return dict(pairs)


def kind_of(value: Any) -> str:
    """What a value is called in JSON."""
    return {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }[type(value)]


def typed(values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of one type; raises ApiError for another."""
    value = values.get(name, default)
    if value is default or type(value) is kind:
        return value
    wanted = {
        dict: "an object",
        bool: "true or false",
        int: "a whole number",
        list: "an array",
        str: "a text",
    }[kind]
    raise ApiError(400, f"{name} is {value!r}; expected {wanted}", param=name)


def number_of(values: Mapping[str, Any], name: str, default: float) -> int | float:
    """A number; raises ApiError for anything else."""
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ApiError(400, f"{name} is {value!r}; expected a number", param=name)
    return value


def count_of(values: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number of 1 or more; raises ApiError for anything else."""
    value = typed(values, name, int, default)
    if value < 1:
        raise ApiError(400, f"{name} is {value}; expected 1 or more", param=name)
    return value
