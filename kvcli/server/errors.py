"""Errors as OpenAI's clients expect them, whatever went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvcli.engine.request import EngineStopped, QueueFull
from kvcli.errors import KvcliError, UsageError

_LONGEST = 500  # characters of a message: some quote what was sent


class ApiError(Exception):
    """An error that the client is told.

    Parameters
    ----------
    status
        HTTP status.
    message
        One sentence.
    code
        For programs, such as ``model_not_found``.
    param
        The field at fault.
    headers
        Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return OpenAI's JSON."""
        # half of a surrogate pair is legal in JSON and cannot be sent back
        message = self.message[:_LONGEST].encode(errors="replace").decode()
        return {"error": {"message": message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return it as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def as_api_error(error: BaseException) -> ApiError:
    """Return any error as one for the client; of what it should not see only that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.".replace("..", "."), headers=error.headers)
    if isinstance(error, QueueFull):
        retry = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, f"{error}", code="queue_full", headers=retry)
    if isinstance(error, EngineStopped):
        return ApiError(503, f"{error}", code="unavailable")
    if isinstance(error, UsageError):
        return ApiError(400, f"{error}")
    if isinstance(error, KvcliError):
        return ApiError(500, f"{error}")
    return ApiError(500, "Internal error; the server's log has the details.", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """Name the first field at fault, with what each of the types that it may have asks for."""
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first['ctx']['error']}.", code="invalid_json")
    field = _field(first["loc"])
    if field is None and first["type"] == "value_error":  # a rule about several fields
        return ApiError(400, f"{_plain(first)}.", code="invalid_value")
    if field is None:
        return ApiError(400, "The body must be a JSON object, with Content-Type: application/json.")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument: {field}.", code="unknown_parameter", param=field)
    said = dict.fromkeys(_plain(x) for x in found if _field(x["loc"]) == field)
    return ApiError(400, f"{field}: {', or '.join(list(said)[:3])}.", code="invalid_value", param=field)


def _plain(found: Any) -> str:
    return str(found["msg"]).removeprefix("Value error, ")


def _field(loc: tuple[Any, ...]) -> str | None:
    """Return the field that an error is about, without what pydantic adds to tell a union's members apart."""
    return str(loc[1])[:64] if len(loc) > 1 else None


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


def install(app: FastAPI) -> None:
    """Answer every expected error in OpenAI's shape; :mod:`kvcli.server.guard` does the unexpected."""
    for kind in (ApiError, KvcliError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
