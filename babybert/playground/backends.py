"""The two backends of the playground: a served model behind its HTTP API, or a checkpoint in this process.

Both take a request body of the API (docs/api.md) and return the status and JSON that the API would. The page therefore
handles one format, and shows every error message as the API writes it.
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

from babybert.errors import UserError
from babybert.serving import request_schema

if TYPE_CHECKING:
    from babybert.serving.predictor import Predictor  # imports PyTorch, which a page for an endpoint does not need

PREDICTIONS_PATH = "/predictions/babybert"
JSON_TYPE = "application/json"
PROBE_BODY = json.dumps({"text": "[MASK]", "top_k": 1}).encode()  # the cheapest request, to see whether it is answered
ANSWER_SECONDS = 60.0  # timeout of a request
PROBE_SECONDS = 5.0  # timeout of a probe


class EndpointDown(UserError):
    """The endpoint does not answer."""


@dataclass(frozen=True)
class ApiResponse:
    """A response of the HTTP API, or one in its format.

    Attributes:
        status: HTTP status.
        body: parsed JSON.
        version: version of the model, from the response's header; None for a checkpoint in this process.
    """

    status: int
    body: Any
    version: str | None = None


class EndpointBackend:
    """A served model. `url` is a server, to which the path of the API is added, or a complete address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        is_server_only = parts.path in ("", "/")
        self.url = urlunsplit(parts._replace(path=PREDICTIONS_PATH)) if is_server_only else url

    def query(self, body: bytes, content_type: str = JSON_TYPE, timeout: float = ANSWER_SECONDS) -> ApiResponse:
        """The endpoint's response, whatever its status. Raises EndpointDown if there is none."""
        request = urllib.request.Request(self.url, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return _read_response(response.status, response.headers, response.read(), response.reason)
        except urllib.error.HTTPError as error:
            with error:
                return _read_response(error.code, error.headers, error.read(), error.reason)
        except (OSError, http.client.HTTPException) as error:
            raise EndpointDown(f"{self.url} does not answer: {_reason(error, timeout)}") from error

    def problem(self) -> str | None:
        """Why the endpoint cannot answer now, or None if it can."""
        try:
            response = self.query(PROBE_BODY, timeout=PROBE_SECONDS)
        except EndpointDown as error:
            return str(error)
        if response.status < 500:
            return None
        return f"{self.url} answers {response.status}: {error_message(response.body)}"

    def classifier(self) -> dict[str, Any] | None:
        """The classes of a fine-tuned model, and whether it reads pairs; None if it has none, or does not answer."""
        for text in ("a", ["a", "a"]):
            with contextlib.suppress(EndpointDown):
                response = self.query(json.dumps({"classify": text}).encode(), timeout=PROBE_SECONDS)
                if response.status == 200 and isinstance(response.body, dict):
                    return {"classes": list(response.body["probabilities"]), "pairs": isinstance(text, list)}
        return None


class LocalBackend:
    """A checkpoint in this process. The model handles one request at a time."""

    def __init__(self, predictor: "Predictor") -> None:
        self.predictor = predictor
        self._lock = threading.Lock()

    def query(self, body: bytes, content_type: str = JSON_TYPE) -> ApiResponse:
        """What the API would respond."""
        with self._lock:
            return respond(self.predictor, body, content_type)

    def problem(self) -> str | None:
        """Always None: a model in this process answers whenever the page does."""
        return None

    def classifier(self) -> dict[str, Any] | None:
        """The classes of a fine-tuned model, and whether it reads pairs; None for a pretrained one."""
        facts = self.predictor.classifier
        return None if facts is None else {"classes": list(facts.classes), "pairs": facts.pairs}


def respond(predictor: "Predictor", body: bytes, content_type: str = JSON_TYPE) -> ApiResponse:
    """The response to a request body of the API from a model in this process."""
    try:
        request = request_schema.parse(body, content_type, predictor.classifier)
        answers = predictor.predict(request.items)
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
    except UserError as error:
        return error_response(error)
    return ApiResponse(200, answers[0] if request.single else answers)


def error_response(error: UserError) -> ApiResponse:
    """An error in the format of the API."""
    return ApiResponse(request_schema.http_status(error), {"error": str(error)})


def error_message(body: Any) -> str:
    """The message in the body of an error: our handler's or TorchServe's."""
    if not isinstance(body, dict):
        return str(body)
    return str(body.get("error") or body.get("message") or body)


def _read_response(status: int, headers: Any, content: bytes, reason: str) -> ApiResponse:
    with contextlib.suppress(ValueError):
        return ApiResponse(status, json.loads(content), headers.get("X-BabyBERT-Version"))
    # A body that is not JSON does not come from the API, but from a proxy, for example; or there is no body.
    body = {"error": f"{reason or 'no reason given'} (the endpoint sent no JSON)"}
    return ApiResponse(status if status >= 400 else 502, body)


def _reason(error: Exception, timeout: float) -> str:
    """A short reason for a failed request; URLError wraps the error that has it."""
    wrapped = getattr(error, "reason", None) if isinstance(error, urllib.error.URLError) else None
    cause = wrapped if isinstance(wrapped, Exception) else error
    if isinstance(cause, TimeoutError):
        return f"nothing came within {timeout:g} s"
    if isinstance(cause, socket.gaierror):
        return "there is no such host"
    return (getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).lower()
