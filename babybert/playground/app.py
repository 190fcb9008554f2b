"""`babybert playground`: one page, and the few addresses of JSON that it asks, served by Starlette and uvicorn.

The page is plain HTML, CSS and JavaScript, without a build step and without anything from elsewhere: it works offline,
and its Content-Security-Policy holds it to that. Gradio 6.31 was tried first and left: it needs a Pillow older than the
one that matplotlib has here and more than a dozen packages beside these two, axe finds too little contrast in its
default theme, and what this page is made of (a mask at the cursor, bars to click, gauge, heat map, a banner that goes
away) would have been our own HTML inside it all the same.

Each address below /api answers with the status and JSON of the HTTP API; an endpoint that is down is a 502 with
`"down": true`. A page on loopback answers only to loopback's names, so that no site can reach it by a name of its own.
"""

import asyncio
import json
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
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
from babybert.errors import UsageError, UserError
from babybert.playground.models import JSON_TYPE, Answer, Endpoint, EndpointDown, Local, message, refusal
from babybert.progress import say
from babybert.serving import request_schema

if TYPE_CHECKING:
    from babybert.playground.history import Run  # loads PyTorch, as what looks inside does

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NO_INSIDE = "Only an endpoint is given, and its HTTP API does not tell the model's inside. Start the page with --checkpoint PATH to see it."
NO_RUN = "No run is given. Start the page with --run PATH or --run s3://bucket/prefix to see its curves and ask its checkpoints."


@dataclass(frozen=True)
class Shown:
    """What one page shows."""

    model: Endpoint | Local
    name: str  # of the model, for people
    run: "Run | None"


def playground(config: PlaygroundConfig) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns 0 after those. Raises UserError."""
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(open_model(config), config.host),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )
    listener = _listen(config.host, config.port)
    with listener:
        host, port = listener.getsockname()[:2]
        say(f"playground: http://{f'[{host}]' if ':' in host else host}:{port}/; Ctrl-C stops it")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(
                number, lambda number, frame: None
            )  # uvicorn raises what ended it once more, for whoever was there before
        server.run(sockets=[listener])
    say("stopped")
    return 0


def open_model(config: PlaygroundConfig) -> Shown:
    """What the settings name. Raises UserError."""
    run_address = config.run
    if config.checkpoint is None:
        assert config.endpoint is not None
        endpoint = Endpoint(config.endpoint)
        model: Endpoint | Local = endpoint
        name = f"Asks {endpoint.url} over the HTTP API."
    else:
        from babybert.checkpoint.format import STEP_FOLDER
        from babybert.checkpoint.source import CheckpointSource
        from babybert.serving.predictor import Predictor

        with tempfile.TemporaryDirectory(prefix="babybert-playground-") as folder:
            found = CheckpointSource(config.checkpoint).find(Path(folder))
            model = Local(Predictor.load(found))
        name = f"Checkpoint {found.name} of {config.checkpoint}."
        if run_address is None and not STEP_FOLDER.match(Path(config.checkpoint).resolve().name):
            run_address = config.checkpoint
    if run_address is None:
        return Shown(model, name, None)
    from babybert.playground.history import Run

    return Shown(model, name, Run(run_address))


def make_app(shown: Shown, host: str) -> Starlette:
    """The page and its addresses for one model; `host` is where they are to be reached."""
    routes: list[BaseRoute] = [
        Route("/", lambda request: FileResponse(PAGE / "index.html", headers=HEADERS)),
        Route("/api/about", _get(lambda: Answer(200, about(shown)))),
        Route(
            "/api/health",
            _get(
                lambda: Answer(200, {"problem": shown.model.problem() if isinstance(shown.model, Endpoint) else None})
            ),
        ),
        Route("/api/predict", _post(shown.model.answer), methods=["POST"]),
    ]
    if isinstance(shown.model, Local):
        local = shown.model
        routes += [
            Route("/api/inside", _post(lambda body, kind: _inside(local, body, kind)), methods=["POST"]),
            Route("/api/neighbours", _post(lambda body, kind: _neighbours(local, body, kind)), methods=["POST"]),
        ]
    if shown.run:
        run = shown.run
        routes += [
            Route("/api/curves", _get(lambda: Answer(200, run.curves()))),
            Route("/api/checkpoints", _post(run.answer), methods=["POST"]),
        ]
    routes.append(Mount("/page", _Page(directory=PAGE)))
    hosts = list(LOOPBACK) if host in LOOPBACK else ["*"]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def about(shown: Shown) -> dict[str, Any]:
    """What the page says of its model; a part that cannot be shown has a line in place of what it needs."""
    inside = None
    if isinstance(shown.model, Local):
        from babybert.playground.inside import facts

        inside = facts(shown.model.predictor)
    return {
        "name": shown.name,
        "inside": inside,
        "no_inside": "" if inside else NO_INSIDE,
        "run": shown.run.address if shown.run else None,
        "no_run": "" if shown.run else NO_RUN,
    }


class _Page(StaticFiles):
    """The page's files; the browser is to ask each time whether they have changed."""

    def file_response(self, *arguments: Any, **settings: Any) -> Response:
        response = super().file_response(*arguments, **settings)
        response.headers.update(HEADERS)
        return response


def _inside(local: Local, body: bytes, kind: str) -> Answer:
    from babybert.playground.inside import look_inside

    asked = _keys(body, kind, ("sentence_a", "sentence_b", "layer", "head"))
    return Answer(200, look_inside(local.predictor, **asked))


def _neighbours(local: Local, body: bytes, kind: str) -> Answer:
    from babybert.playground.inside import near

    return Answer(200, near(local.predictor, **_keys(body, kind, ("word",))))


def _keys(body: bytes, kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The object in a body of the page's own, which has these keys. Raises UsageError."""
    if kind.split(";")[0].strip().lower() != JSON_TYPE:
        raise request_schema.UnsupportedType(f"the content type must be {JSON_TYPE}")
    try:
        found = json.loads(body)
    except ValueError as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict) or set(found) != set(names):
        raise UsageError(f"the body must be a JSON object with {', '.join(names)}")
    return found


def _get(ask: Callable[[], Answer]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        return await _in_background(ask)

    return answer


def _post(ask: Callable[[bytes, str], Answer]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > request_schema.MAX_BODY_BYTES:
                return JSONResponse({"error": f"the body is longer than {request_schema.MAX_BODY_BYTES:,} bytes"}, 413)
        return await _in_background(lambda: ask(body, request.headers.get("content-type", "")))

    return answer


async def _in_background(ask: Callable[[], Answer]) -> Response:
    """The response to one question, asked in a daemon thread: an endpoint that hangs does not keep the page from ending."""
    future: Future[Response] = Future()
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it, so that its result may be set

    def work() -> None:
        try:
            future.set_result(_respond(ask))
        except BaseException as error:  # a defect of ours: Starlette tells it, in its own thread
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        return JSONResponse({"error": "the playground is ending"}, 503)


def _respond(ask: Callable[[], Answer]) -> Response:
    try:
        found = ask()
    except EndpointDown as error:
        return JSONResponse({"error": str(error), "down": True}, 502)
    except UserError as error:
        found = refusal(error)
    headers = {**HEADERS, **({"X-BabyBERT-Version": found.version} if found.version else {})}
    return JSONResponse(found.body if found.status == 200 else {"error": message(found.body)}, found.status, headers)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --host or --port"
        ) from error
