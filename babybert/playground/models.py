"""The two models that a page can ask: a served one, over its public HTTP API alone, or a checkpoint in this process.

Both take a body of the API (docs/api.md) and give the status and the JSON that the API would, so that the page knows
one language and shows every refusal as the API says it.
"""

import contextlib
import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from babybert.errors import UsageError, UserError
from babybert.serving import request_schema

if TYPE_CHECKING:
    from babybert.serving.predictor import Predictor  # loads PyTorch, which a page for an endpoint has no use for

PREDICTIONS = "/predictions/babybert"
JSON_TYPE = "application/json"
SMALLEST = json.dumps({"text": "[MASK]", "top_k": 1}).encode()  # the cheapest question there is: is anybody there?
ANSWER_SECONDS = 60.0
PROBE_SECONDS = 5.0


class EndpointDown(UserError):
    """Nobody answers at the endpoint."""


@dataclass(frozen=True)
class Answer:
    """An HTTP status, the JSON that came with it, and the version of the model that a header names."""

    status: int
    body: Any
    version: str | None = None


class Endpoint:
    """A served model. `url` is a server (its path is added) or a whole address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = urlunsplit(parts._replace(path=PREDICTIONS)) if parts.path in ("", "/") else url

    def answer(self, body: bytes, content_type: str = JSON_TYPE, seconds: float = ANSWER_SECONDS) -> Answer:
        """The endpoint's own answer, whatever its status. Raises EndpointDown when there is none."""
        request = urllib.request.Request(self.url, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return _read(response.status, response.headers, response.read(), response.reason)
        except urllib.error.HTTPError as error:
            with error:
                return _read(error.code, error.headers, error.read(), error.reason)
        except (OSError, http.client.HTTPException) as error:
            raise EndpointDown(f"{self.url} does not answer: {_reason(error, seconds)}") from error

    def problem(self) -> str | None:
        """Why nothing can be asked now; None if it can."""
        try:
            answer = self.answer(SMALLEST, seconds=PROBE_SECONDS)
        except EndpointDown as error:
            return str(error)
        return f"{self.url} answers {answer.status}: {message(answer.body)}" if answer.status >= 500 else None


class Local:
    """A checkpoint in this process. One question at a time goes through the model."""

    def __init__(self, predictor: "Predictor") -> None:
        self.predictor = predictor
        self._lock = threading.Lock()

    def answer(self, body: bytes, content_type: str = JSON_TYPE) -> Answer:
        """What the API would answer."""
        with self._lock:
            return answer_here(self.predictor, body, content_type)


def answer_here(predictor: "Predictor", body: bytes, content_type: str = JSON_TYPE) -> Answer:
    """The answer of a model in this process to a body of the API, with the API's status."""
    try:
        request = request_schema.parse(body, content_type)
        answers = predictor.answer(request.items)
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
    except UserError as error:
        return refusal(error)
    return Answer(200, answers[0] if request.single else answers)


def refusal(error: UserError) -> Answer:
    """An error as the API puts it."""
    status = 415 if isinstance(error, request_schema.UnsupportedType) else 400 if isinstance(error, UsageError) else 500
    return Answer(status, {"error": str(error)})


def message(body: Any) -> str:
    """The line in an error's body: ours, or TorchServe's."""
    return str(body.get("error") or body.get("message") or body) if isinstance(body, dict) else str(body)


def _read(status: int, headers: Any, content: bytes, reason: str) -> Answer:
    with contextlib.suppress(ValueError):
        return Answer(status, json.loads(content), headers.get("X-BabyBERT-Version"))
    # A body that is no JSON is not from the API: a proxy's page, or nothing at all.
    return Answer(
        status if status >= 400 else 502, {"error": f"{reason or 'no reason given'} (the endpoint sent no JSON)"}
    )


def _reason(error: Exception, seconds: float) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, TimeoutError):
        return f"nothing came within {seconds:g} s"
    if isinstance(cause, socket.gaierror):
        return "there is no such host"
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).lower()
