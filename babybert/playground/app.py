"""`babybert playground`: one web page and the JSON routes that it calls, served with Starlette and uvicorn.

The page is plain HTML, CSS and JavaScript without a build step. It loads nothing from other servers, so it works
offline; its Content-Security-Policy enforces that. Gradio 6.31 was tried and not used: it needs an older Pillow than
our matplotlib and a dozen more packages, its default theme fails axe's contrast checks, and most elements of this page
(inserting masks, clickable bars, gauge, heat map, banner) would have been custom HTML there as well.

Each route below /api answers with the status and JSON of the HTTP API. An endpoint that does not answer is a 502 with
`"down": true`. A page that listens on loopback accepts only requests to loopback's host names, so that another site
cannot reach it through DNS rebinding.
"""

import asyncio
import errno
import json
import logging
import signal
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from babybert.config import PlaygroundConfig
from babybert.encoding import printable
from babybert.errors import UsageError, UserError, os_reason
from babybert.folders import temporary_folder
from babybert.playground.backends import (
    JSON_TYPE,
    ApiResponse,
    EndpointBackend,
    EndpointDown,
    LocalBackend,
    error_message,
    error_response,
)
from babybert.serving import request_schema

if TYPE_CHECKING:
    from babybert.playground.run_history import (
        RunHistory,
    )  # imports PyTorch, which a page for an endpoint does not need

DEFAULT_PORT = 7860
PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NO_INSPECTION = (
    "Only an endpoint was given, and the HTTP API does not expose tokens, their scores, attention or embeddings. "
    "Start the page with --checkpoint PATH to see them."
)
NO_CLASSES = "The model is pretrained only. Show one that `babybert finetune` has trained to classify texts."
NOT_PRETRAINED = "The model is fine-tuned to classify texts. Show the pretrained model for this section."
NO_RUN = (
    "No run was given. Start the page with --run PATH or --run s3://bucket/prefix to see its curves and query its "
    "checkpoints."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlaygroundSources:
    """What one page shows.

    Attributes:
        backend: the model that answers.
        description: of the model, for the head of the page.
        run: the run whose history is shown; None without one.
    """

    backend: EndpointBackend | LocalBackend
    description: str
    run: "RunHistory | None"


def playground(config: PlaygroundConfig) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 0 after those. Raises UserError."""
    settings = uvicorn.Config(
        make_app(open_sources(config), config.host),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(settings)
    with _listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        url_host = f"[{host}]" if ":" in host else host
        logger.info(f"playground: http://{url_host}:{port}/; Ctrl-C stops it")
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            # After its shutdown, uvicorn raises the signal again for the handler that was installed before its own.
            signal.signal(signal_number, lambda received, frame: None)
        server.run(sockets=[listener])
    logger.info("stopped")
    return 0


def open_sources(config: PlaygroundConfig) -> PlaygroundSources:
    """Open the model and the run that the settings name. Raises UserError."""
    run_address = config.run
    backend: EndpointBackend | LocalBackend
    if config.checkpoint is None:
        assert config.endpoint is not None  # PlaygroundConfig requires one of the two
        backend = EndpointBackend(config.endpoint)
        description = f"Asks {backend.url} over the HTTP API."
    else:
        backend, name = _load_checkpoint(config.checkpoint)
        description = f"Checkpoint {name} of {config.checkpoint}."
        if run_address is None and not _is_single_checkpoint(config.checkpoint):
            run_address = config.checkpoint
    if run_address is None:
        return PlaygroundSources(backend, description, None)
    from babybert.playground.run_history import RunHistory

    return PlaygroundSources(backend, description, RunHistory(run_address))


def _load_checkpoint(address: str) -> tuple[LocalBackend, str]:
    """The checkpoint at an address, loaded, and its name."""
    from babybert.checkpoint.source import CheckpointSource
    from babybert.serving.predictor import Predictor

    with temporary_folder("playground") as folder:
        checkpoint = CheckpointSource(address).find(folder)
        return LocalBackend(Predictor.load(checkpoint)), checkpoint.name


def _is_single_checkpoint(address: str) -> bool:
    from babybert.checkpoint.format import STEP_FOLDER

    return bool(STEP_FOLDER.match(Path(address).resolve().name))


def make_app(sources: PlaygroundSources, host: str) -> Starlette:
    """The page and its routes; `host` is the address that they listen on."""
    backend = sources.backend
    routes: list[BaseRoute] = [
        Route("/", lambda request: FileResponse(PAGE / "index.html", headers=HEADERS)),
        Route("/api/about", _get(lambda: ApiResponse(200, about(sources)))),
        Route("/api/health", _get(lambda: ApiResponse(200, {"problem": backend.problem()}))),
        Route("/api/predict", _post(backend.query), methods=["POST"]),
    ]
    if isinstance(backend, LocalBackend):
        routes += [
            Route("/api/inside", _post(partial(_inspect, backend)), methods=["POST"]),
            Route("/api/neighbours", _post(partial(_nearest, backend)), methods=["POST"]),
            Route("/api/preference", _post(partial(_prefer, backend)), methods=["POST"]),
        ]
    if sources.run:
        run = sources.run
        routes += [
            Route("/api/curves", _get(lambda: ApiResponse(200, run.curves()))),
            Route("/api/checkpoints", _post(run.query_checkpoints), methods=["POST"]),
        ]
    routes.append(Mount("/page", _PageFiles(directory=PAGE)))
    allowed_hosts = list(LOOPBACK) if host in LOOPBACK else ["*"]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)])


def about(sources: PlaygroundSources) -> dict[str, Any]:
    """What the page says about its model; for a section that cannot be shown, the reason."""
    facts = None
    classifier = sources.backend.classifier()
    if isinstance(sources.backend, LocalBackend) and classifier is None:
        from babybert.playground.inspection import model_facts

        facts = model_facts(sources.backend.predictor)
    return {
        "name": printable(sources.description),
        "classifier": classifier,
        "no_classifier": "" if classifier else NO_CLASSES,
        "no_pretrained": NOT_PRETRAINED if classifier else "",
        "inside": facts,
        "no_inside": "" if facts else (NOT_PRETRAINED if classifier else NO_INSPECTION),
        "run": printable(sources.run.address) if sources.run else None,
        "no_run": "" if sources.run else NO_RUN,
    }


class EscapedJsonResponse(JSONResponse):
    """JSON in ASCII: a path may have bytes that are not text, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class _PageFiles(StaticFiles):
    """The files of the page, with our headers; "no-cache" makes the browser ask each time whether they have changed."""

    def file_response(self, *arguments: Any, **settings: Any) -> Response:
        response = super().file_response(*arguments, **settings)
        response.headers.update(HEADERS)
        return response


def _inspect(backend: LocalBackend, body: bytes, content_type: str) -> ApiResponse:
    from babybert.playground.inspection import inspect_text

    arguments = _parse_body(body, content_type, ("sentence_a", "sentence_b", "layer", "head"))
    return ApiResponse(200, inspect_text(backend.predictor, **arguments))


def _nearest(backend: LocalBackend, body: bytes, content_type: str) -> ApiResponse:
    from babybert.playground.inspection import nearest_words

    return ApiResponse(200, nearest_words(backend.predictor, **_parse_body(body, content_type, ("word",))))


def _prefer(backend: LocalBackend, body: bytes, content_type: str) -> ApiResponse:
    from babybert.playground.inspection import preferred_sentence

    arguments = _parse_body(body, content_type, ("sentence_a", "sentence_b"))
    return ApiResponse(200, preferred_sentence(backend.predictor, **arguments))


def _parse_body(body: bytes, content_type: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object in the body of a request from the page, which must have these keys. Raises UsageError."""
    if content_type.split(";")[0].strip().lower() != JSON_TYPE:
        raise request_schema.UnsupportedType(f"the content type must be {JSON_TYPE}")
    try:
        values = json.loads(body)
    except ValueError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict) or set(values) != set(keys):
        raise UsageError(f"the body must be a JSON object with {', '.join(keys)}")
    return values


def _get(handler: Callable[[], ApiResponse]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a GET route."""

    async def endpoint(request: Request) -> Response:
        return await _run_in_thread(handler)

    return endpoint


def _post(handler: Callable[[bytes, str], ApiResponse]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a POST route; `handler` is called with the body and its content type."""

    async def endpoint(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > request_schema.MAX_BODY_BYTES:
                return EscapedJsonResponse(
                    {"error": f"the body is longer than {request_schema.MAX_BODY_BYTES:,} bytes"}, 413
                )
        content_type = request.headers.get("content-type", "")
        return await _run_in_thread(lambda: handler(body, content_type))

    return endpoint


async def _run_in_thread(handler: Callable[[], ApiResponse]) -> Response:
    """Call `handler` in a daemon thread, so that an endpoint that hangs does not keep the page from ending."""
    future: Future[Response] = Future()
    future.set_running_or_notify_cancel()  # now it cannot be cancelled, so the thread can always set its result

    def run() -> None:
        try:
            future.set_result(_make_response(handler))
        except BaseException as error:  # a bug: Starlette logs it, in its own thread
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        return EscapedJsonResponse({"error": "the playground is ending"}, 503)


def _make_response(handler: Callable[[], ApiResponse]) -> Response:
    try:
        answer = handler()
    except EndpointDown as error:
        return EscapedJsonResponse({"error": str(error), "down": True}, 502)
    except UserError as error:
        answer = error_response(error)
    headers = dict(HEADERS)
    if answer.version:
        headers["X-BabyBERT-Version"] = answer.version
    body = answer.body if answer.status == 200 else {"error": error_message(answer.body)}
    return EscapedJsonResponse(body, answer.status, headers)


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket. Without a port: DEFAULT_PORT, or a free one if that is taken. Raises UsageError."""
    if port is not None:
        return _bind(host, port)
    try:
        return _bind(host, DEFAULT_PORT)
    except UsageError as error:
        is_taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
        if not is_taken:
            raise
    listener = _bind(host, 0)
    logger.info(f"port {DEFAULT_PORT} is taken; using port {listener.getsockname()[1]}")
    return listener


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError: the name of the host cannot be encoded
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise UsageError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from error
