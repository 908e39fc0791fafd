"""What operators look at: health, readiness, metrics, and a page."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from kvcli.server.metrics import Metrics
from kvcli.server.schemas import Status
from kvcli.server.served import ServingEngine

# everything the page needs is in it
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def operations(engine: ServingEngine, metrics: Metrics) -> APIRouter:
    """Return the endpoints that need no key."""
    router = APIRouter()
    page = files("kvcli.server").joinpath("status.html").read_text("utf-8")
    red: dict[int | str, dict[str, Any]] = {503: {"model": Status}}

    @router.get("/", response_class=HTMLResponse)
    async def status_page() -> HTMLResponse:
        """Show what the server does, and a box to try it."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})

    @router.get("/health", response_model=Status, responses=red)
    async def health() -> JSONResponse:
        """Tell whether the process does its work; one that does not is best started anew."""
        return _status("failed" if engine.failed else "ok")

    @router.get("/ready", response_model=Status, responses=red)
    async def ready(request: Request) -> JSONResponse:
        """Tell whether new requests are taken."""
        draining = getattr(request.app.state, "draining", False)
        return _status("failed" if engine.failed else "draining" if draining else "ok")

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Return the metrics for Prometheus."""
        # the engine may hold its lock for the length of a step
        text = await run_in_threadpool(metrics.render)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _status(status: str) -> JSONResponse:
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)
