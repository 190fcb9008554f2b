"""The TorchServe handler: JSON in, `babybert.serving`, JSON out.

TorchServe hands over a batch of requests, whatever their method or content type. Each request gets one response:
an invalid one is answered with 400, 415 or 500 and `{"error": "..."}`, and does not affect the others. The items of all
requests of a batch go through the model together.

TorchServe reads metrics from lines on the worker's output. Values are summed over a batch first, to write few lines,
and with TorchServe's `CachingMetric` directly: its metrics cache would put the ids of all requests on each line.

TorchServe's worker reads its socket with one system call for each field of each header, which takes 1.5 ms for 32
requests. `install_read_ahead` replaces that with reads of everything that has arrived.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_type_enum import MetricTypes
from ts.protocol import otf_message_handler

from babybert.errors import UsageError, UserError
from babybert.serving.predictor import BatchStats, Predictor
from babybert.serving.request_schema import UNKNOWN, Request, http_status, parse

MAX_RESPONSE_BYTES = 6_000_000  # TorchServe's own limit is 6.5 MB by default: a longer response kills the worker
READ_AHEAD_BYTES = 65536  # a batch of small requests
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)
PHRASES = {400: "Bad Request", 415: "Unsupported Media Type", 500: "Internal Server Error"}
OUTCOMES = {200: "ok", 400: "bad_request", 415: "bad_request", 500: "failed"}

# Name: (type, unit, labels). metrics.yaml declares the same metrics; TorchServe drops those that it does not declare.
METRICS: dict[str, tuple[Any, str, list[str]]] = {
    "babybert_inference_requests_total": (MetricTypes.COUNTER, "Count", ["task", "outcome"]),
    "babybert_inference_items_total": (MetricTypes.COUNTER, "Count", ["task"]),
    "babybert_inference_masks_total": (MetricTypes.COUNTER, "Count", []),
    "babybert_inference_tokens_total": (MetricTypes.COUNTER, "Count", []),
    "babybert_inference_batch_requests": (MetricTypes.HISTOGRAM, "Count", []),
    "babybert_inference_batch_seconds": (MetricTypes.HISTOGRAM, "s", []),
    "babybert_inference_phase_seconds": (MetricTypes.HISTOGRAM, "s", ["phase"]),
    "babybert_model_info": (MetricTypes.GAUGE, "Count", ["version", "step", "digest"]),
    "babybert_model_load_seconds": (MetricTypes.GAUGE, "s", []),
}


class BabyBertHandler:
    """The model of one worker. TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context: Any) -> None:
        """Load the model from the folder of the unpacked archive, and compile its kernels."""
        start = time.perf_counter()
        # Bodies must arrive as they were sent. If TorchServe decoded them, an invalid one would leave a traceback in
        # the log, and NaN or duplicate keys would be accepted.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the texts of a batch are too few for a second thread
        threads = context.model_yaml_config["handler"]["threads"]
        folder = Path(context.system_properties["model_dir"])
        self.predictor = Predictor.load(folder, compiled=True, threads=threads)
        release_free_memory()
        # With compiled kernels, PyTorch runs small operations only, and its idle threads would spin after each of them.
        torch.set_num_threads(1 if self.predictor.is_compiled else threads)
        served = json.loads((folder / "served.json").read_text(encoding="utf-8"))
        self.headers = {
            "content-type": "application/json",
            "x-babybert-version": served["version"],
            "x-babybert-step": str(served["step"]),
        }
        self.model_name = context.model_name
        self.metrics = {
            name: CachingMetric(name, unit, [*labels, "ModelName", "Level"], metric_type)
            for name, (metric_type, unit, labels) in METRICS.items()
        }
        install_read_ahead(otf_message_handler)
        self.predictor.predict(self.predictor.warm_up_items())  # compiles the kernels
        gc.freeze()  # everything loaded so far stays: exclude it from garbage collection
        self.write_metric("babybert_model_info", 1, served["version"], str(served["step"]), served["digest"])
        self.write_metric("babybert_model_load_seconds", time.perf_counter() - start)

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes | str]:
        """Answer each of `rows` (a dict with the request's body); returns as many JSON texts."""
        start = time.perf_counter()
        stats = BatchStats()
        requests = [self.parse_row(row, index, context) for index, row in enumerate(rows)]
        items = [item for request in requests if isinstance(request, Request) for item in request.items]
        answers = iter(self.predictor.predict(items, stats) if items else ())
        predicted = time.perf_counter()
        responses: list[bytes | str] = []
        outcomes: Counter[tuple[str, str]] = Counter()
        item_counts: Counter[str] = Counter()
        for index, request in enumerate(requests):
            if isinstance(request, Request):
                task = request.task
                item_counts[task] += len(request.items)
                result = combine(request, answers)
            else:
                task, result = UNKNOWN, request
            status, text = encode_response(result)
            for name, value in self.headers.items():
                context.set_response_header(index, name, value)
            if status != 200:
                context.set_response_status(status, PHRASES[status], index)
            outcomes[task, OUTCOMES[status]] += 1
            responses.append(text)
        end = time.perf_counter()
        stats.answer_seconds += end - predicted
        self.write_batch_metrics(len(rows), outcomes, item_counts, stats, end - start)
        return responses

    def parse_row(self, row: dict[str, Any], index: int, context: Any) -> Request | UserError:
        """The request in one row of the batch, or the error that says why it is invalid."""
        # TorchServe keeps the content type of the body among the request's headers, under the name "body". The parts
        # of a form have other names. A client's header of that name replaces it with a string.
        body_part = context.get_request_header(index, "body")
        if isinstance(body_part, dict):
            content_type = body_part["content-type"]
        else:
            content_type = find_header(context, index, "content-type")
        try:
            return parse(row.get("body"), content_type, self.predictor.classifier)
        except UserError as error:
            return error

    def write_batch_metrics(
        self,
        requests: int,
        outcomes: Counter[tuple[str, str]],
        item_counts: Counter[str],
        stats: BatchStats,
        seconds: float,
    ) -> None:
        """Write the metrics of a batch. `outcomes` counts requests by (task, outcome), `item_counts` items by task."""
        for (task, outcome), count in outcomes.items():
            self.write_metric("babybert_inference_requests_total", count, task, outcome)
        for task, count in item_counts.items():
            self.write_metric("babybert_inference_items_total", count, task)
        self.write_metric("babybert_inference_batch_requests", requests)
        self.write_metric("babybert_inference_batch_seconds", seconds)
        if stats.masks:
            self.write_metric("babybert_inference_masks_total", stats.masks)
        if stats.tokens:
            self.write_metric("babybert_inference_tokens_total", stats.tokens)
            self.write_metric("babybert_inference_phase_seconds", stats.tokenize_seconds, "tokenize")
            self.write_metric("babybert_inference_phase_seconds", stats.forward_seconds, "forward")
            self.write_metric("babybert_inference_phase_seconds", stats.answer_seconds, "answer")

    def write_metric(self, name: str, value: float, *labels: str) -> None:
        """Write one line for TorchServe to read."""
        self.metrics[name].add_or_update(value, [*labels, self.model_name, "Model"])


def release_free_memory() -> None:
    """Return the 16 MB that loading has freed to the system; glibc would keep them."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if malloc_trim is not None:
        malloc_trim(0)


def install_read_ahead(protocol: Any) -> None:
    """Make the worker read its connection in large pieces; the messages it reads stay the same.

    `protocol` is TorchServe's `otf_message_handler`. To be called between two messages.
    """
    pending = b""  # received, of which the first `position` bytes are consumed
    position = 0

    def retrieve_buffer(connection: Any, length: int) -> bytes:
        nonlocal pending, position
        end = position + length
        if end > len(pending):
            pending = receive_at_least(connection, end - len(pending), pending[position:])
            position = 0
            end = length
        buffer = pending[position:end]
        position = end
        return buffer

    def retrieve_int(connection: Any) -> int:
        return int.from_bytes(retrieve_buffer(connection, protocol.int_size), "big", signed=True)

    protocol._retrieve_buffer = retrieve_buffer
    protocol._retrieve_int = retrieve_int


def receive_at_least(connection: Any, length: int, received: bytes) -> bytes:
    """`received` and at least `length` more bytes. Exits if TorchServe closes the connection, as its worker does."""
    packets = [received]
    while length > 0:
        packet = connection.recv(max(length, READ_AHEAD_BYTES))
        if not packet:
            sys.exit(0)
        packets.append(packet)
        length -= len(packet)
    return b"".join(packets)


def find_header(context: Any, index: int, name: str) -> str | None:
    """A request header by its lower-case name, however the client wrote it; None without it."""
    for key, value in context.get_all_request_header(index).items():
        if key.lower() == name:
            return str(value)
    return None


def combine(request: Request, answers: Iterator[Any]) -> Any:
    """The result of a request: the answers to its items, taken from `answers`, or the first error among them."""
    item_answers = [next(answers) for _ in request.items]
    for answer in item_answers:
        if isinstance(answer, UserError):
            return answer
    return item_answers[0] if request.single else item_answers


def encode_response(result: Any) -> tuple[int, bytes | str]:
    """The HTTP status and the JSON text of an answer or an error."""
    if isinstance(result, UserError):
        return http_status(result), json.dumps({"error": str(result)}, ensure_ascii=False)
    text = JSON_ENCODER.encode(result).encode()
    if len(text) > MAX_RESPONSE_BYTES:
        error = UsageError(
            f"the answer would be {len(text):,} bytes long, at most {MAX_RESPONSE_BYTES:,} are sent: "
            "ask for less at once"
        )
        return encode_response(error)
    return 200, text
