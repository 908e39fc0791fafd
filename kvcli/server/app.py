"""The application: endpoints, guard and errors put together."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import kvcli
from kvcli.server import errors
from kvcli.server.guard import Guard
from kvcli.server.metrics import Metrics
from kvcli.server.operations import operations
from kvcli.server.routes import api
from kvcli.server.served import ServedModel, ServingEngine, Settings


def create_app(engine: ServingEngine, model: ServedModel, settings: Settings) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    engine
        Computes; it need not be started yet.
    model
        Its text side.
    settings
        Key, origins, bounds.
    """
    # no pages that load scripts from elsewhere; the document itself is at /openapi.json
    app = FastAPI(title="kvcli", version=kvcli.__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(engine)
    app.include_router(operations(engine, metrics))
    app.include_router(api(engine, model, settings, metrics))
    errors.install(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"], expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    made = app.openapi

    def openapi() -> dict[str, Any]:
        """Return the document without the status that FastAPI gives bad fields and we do not."""
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app
