"""TorchServe's side of BabyBERT: JSON in, `babybert.serving`, JSON out.

TorchServe hands over a batch of requests, whatever their method or content type. Each gets an answer of its own: one
that cannot be answered is a 400, 415 or 500 with `{"error": "..."}`, and its neighbours are not harmed. The items of
all requests of a batch go through the model together.

Metrics are lines on the worker's output, which TorchServe reads: they are added up over a batch, and written by
TorchServe's own metric objects, without the ids of all requests that its cache would put on each line.

TorchServe's worker reads its socket with one system call for each field of each header, a millisecond and a half for 32
requests: it is given a way to read that takes all that has arrived.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_type_enum import MetricTypes
from ts.protocol import otf_message_handler

from babybert.errors import DataError, UserError
from babybert.serving import request_schema
from babybert.serving.predictor import Predictor, Work

MAX_RESPONSE_BYTES = 6_000_000  # TorchServe's own limit is 6.5 MB by default: a longer response kills the worker
READ_AHEAD_BYTES = 65536  # a batch of small requests
TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)
PHRASES = {400: "Bad Request", 415: "Unsupported Media Type", 500: "Internal Server Error"}
OUTCOMES = {200: "ok", 400: "bad_request", 415: "bad_request", 500: "failed"}

# Name: type, unit, labels. metrics.yaml declares the same; TorchServe drops what it does not.
METRICS = {
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
    """One worker's model. TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context):
        """Load the model that lies beside this file."""
        start = time.perf_counter()
        # Bodies are to arrive as they were sent: decoded by TorchServe, a bad one leaves a traceback in the log, and
        # NaN or a key that is there twice would pass.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        threads = context.model_yaml_config["handler"]["threads"]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a batch's texts are too little for two threads
        folder = Path(context.system_properties["model_dir"])
        self.predictor = Predictor.load(folder, compiled=True, threads=threads)
        give_back_memory()
        # With kernels, PyTorch has only small operations left, and its threads spin for a while after each.
        torch.set_num_threads(1 if self.predictor.inference.uses_compiled_kernels else threads)
        served = json.loads((folder / "served.json").read_text(encoding="utf-8"))
        self.headers = {
            "content-type": "application/json",
            "x-babybert-version": served["version"],
            "x-babybert-step": str(served["step"]),
        }
        self.metrics = {
            name: CachingMetric(name, unit, [*labels, "ModelName", "Level"], kind)
            for name, (kind, unit, labels) in METRICS.items()
        }
        self.model_name = context.model_name
        read_ahead(otf_message_handler)
        self.predictor.answer(
            [request_schema.FillMask("[MASK]"), request_schema.NextSentence("a", "b")]
        )  # what is compiled is compiled now
        gc.freeze()  # what is there now stays: it need not be looked through for garbage
        self.emit("babybert_model_info", 1, served["version"], str(served["step"]), served["digest"])
        self.emit("babybert_model_load_seconds", time.perf_counter() - start)

    def handle(self, rows, context):
        """Answer each of `rows` (dicts with the request's body); returns as many JSON texts."""
        start = time.perf_counter()
        work = Work()
        parsed = [read(row, index, context) for index, row in enumerate(rows)]
        items = [item for request in parsed if isinstance(request, request_schema.Request) for item in request.items]
        answers = iter(self.predictor.answer(items, work) if items else ())
        answered = time.perf_counter()
        responses, outcomes, counted = [], Counter(), Counter()
        for index, request in enumerate(parsed):
            task, result = request_schema.UNKNOWN, request
            if isinstance(request, request_schema.Request):
                task = request.task
                counted[task] += len(request.items)
                result = put_together(request, [next(answers) for _ in request.items])
            status, text = write(result)
            for name, value in self.headers.items():
                context.set_response_header(index, name, value)
            if status != 200:
                context.set_response_status(status, PHRASES[status], index)
            outcomes[task, OUTCOMES[status]] += 1
            responses.append(text)
        end = time.perf_counter()
        work.answer_seconds += end - answered
        self.count(len(rows), outcomes, counted, work, end - start)
        return responses

    def count(self, rows, outcomes, items, work, seconds):
        """Write a batch's metrics."""
        for labels, number in outcomes.items():
            self.emit("babybert_inference_requests_total", number, *labels)
        for task, number in items.items():
            self.emit("babybert_inference_items_total", number, task)
        self.emit("babybert_inference_batch_requests", rows)
        self.emit("babybert_inference_batch_seconds", seconds)
        if work.masks:
            self.emit("babybert_inference_masks_total", work.masks)
        if work.tokens:
            self.emit("babybert_inference_tokens_total", work.tokens)
            for phase in ("tokenize", "forward", "answer"):
                self.emit("babybert_inference_phase_seconds", getattr(work, f"{phase}_seconds"), phase)

    def emit(self, name, value, *labels):
        """Write one metric's line."""
        self.metrics[name].add_or_update(value, [*labels, self.model_name, "Model"])


def give_back_memory():
    """Give what loading has freed, 16 MB, to the system: the C library keeps it, in pieces that compiling has no use for."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def read_ahead(protocol):
    """Replace how the worker reads its one connection; what it reads is as before. To be called between two messages."""
    pending, position = b"", 0

    def retrieve_buffer(connection, length):
        nonlocal pending, position
        end = position + length
        if end > len(pending):
            packets, missing = [pending[position:]], end - len(pending)
            while missing > 0:
                packets.append(connection.recv(max(missing, READ_AHEAD_BYTES)))
                if not packets[-1]:  # TorchServe has gone
                    sys.exit(0)
                missing -= len(packets[-1])
            pending, position, end = b"".join(packets), 0, length
        found = pending[position:end]
        position = end
        return found

    protocol._retrieve_buffer = retrieve_buffer
    protocol._retrieve_int = lambda connection: int.from_bytes(
        retrieve_buffer(connection, protocol.int_size), "big", signed=True
    )


def read(row, index, context):
    """The request in one row of the batch, or the UserError that says why there is none."""
    # TorchServe keeps the body's type beside the request's headers, by the name "body"; a form's fields have names of their own.
    part = context.get_request_header(index, "body")
    kind = part["content-type"] if isinstance(part, dict) else header(context, index, "content-type")
    try:
        return request_schema.parse(row.get("body"), kind)
    except UserError as error:
        return error


def header(context, index, name):
    """A header of a request, however the client wrote its name; None without it."""
    return next((value for key, value in context.get_all_request_header(index).items() if key.lower() == name), None)


def put_together(request, answers):
    """The answer to a request, or the first error of its items."""
    for answer in answers:
        if isinstance(answer, UserError):
            return answer
    return answers[0] if request.single else answers


def write(result):
    """The HTTP status and the JSON text of an answer or an error."""
    if isinstance(result, UserError):
        status = (
            415 if isinstance(result, request_schema.UnsupportedType) else 500 if isinstance(result, DataError) else 400
        )
        return status, json.dumps({"error": str(result)}, ensure_ascii=False)
    text = TO_JSON.encode(result).encode()
    if len(text) > MAX_RESPONSE_BYTES:
        return write(
            request_schema.UsageError(
                f"the answer would be {len(text):,} bytes long, at most {MAX_RESPONSE_BYTES:,} are sent: ask for less at once"
            )
        )
    return 200, text
