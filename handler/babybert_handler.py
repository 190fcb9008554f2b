"""TorchServe's side of BabyBERT: JSON in, `babybert.inference.Predictor`, JSON out.

TorchServe hands over a batch of requests, whatever their method or content type. Each gets an answer of its own: a
request that cannot be answered is a 400 with `{"error": "..."}`, and its neighbours are not harmed.
"""

import json
import time
from pathlib import Path

import torch
from ts.metrics import dimension, metric_type_enum

from babybert.inference import predictor


class BabyBertHandler:
    """One worker's model. TorchServe calls `initialize` once and `handle` for each batch."""

    def initialize(self, context):
        """Load the model that lies beside this file."""
        # One thread a worker: workers, not threads, share out the cores.
        torch.set_num_threads(context.model_yaml_config["handler"]["threads"])
        self.predictor = predictor.Predictor.load(Path(context.system_properties["model_dir"]))

    def handle(self, rows, context):
        """Answer each of `rows` (dicts with the request's body); returns as many JSON texts."""
        start = time.perf_counter()
        parsed = [parse(row) for row in rows]
        good = {index: request for index, request in enumerate(parsed) if not isinstance(request, ValueError)}
        answers = dict(zip(good, self.predictor.answer(list(good.values())), strict=True))
        responses = []
        for index, request in enumerate(parsed):
            result = answers.get(index, request)
            context.set_response_content_type(index, "application/json")
            failed = isinstance(result, ValueError)
            if failed:
                context.set_response_status(code=400, phrase="Bad Request", idx=index)
            task = {predictor.FillMask: "fill-mask", predictor.NextSentence: "next-sentence"}.get(type(request), "unknown")
            count(context, task, "bad_request" if failed else "ok")
            responses.append(json.dumps({"error": str(result)} if failed else result, ensure_ascii=False))
        # TorchServe adds labels to the list of dimensions that it is given: each call gets a list of its own.
        seconds = time.perf_counter() - start
        context.metrics.add_metric("babybert_inference_batch_seconds", seconds, "s", dimensions=[], metric_type=metric_type_enum.MetricTypes.HISTOGRAM)
        return responses


def parse(row):
    """The request in one row of the batch, or the ValueError that says why there is none."""
    body = row.get("body", row.get("data"))
    try:
        if isinstance(body, (bytes, bytearray)):
            body = body.decode("utf-8")
        if isinstance(body, str):
            body = json.loads(body)
    except (ValueError, RecursionError):
        return ValueError("the body is not JSON; send a JSON object with the header 'Content-Type: application/json'")
    if body is None:
        return ValueError("the request has no JSON body; POST a JSON object with the header 'Content-Type: application/json'")
    try:
        return predictor.parse_request(body)
    except ValueError as error:
        return error


def count(context, task, outcome):
    """Count one request."""
    labels = [dimension.Dimension("task", task), dimension.Dimension("outcome", outcome)]
    context.metrics.add_counter("babybert_inference_requests_total", 1, dimensions=labels)
