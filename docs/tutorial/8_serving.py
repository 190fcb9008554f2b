# %% [markdown]
# # 8. Serving
#
# The last step of the pipeline makes the model available to others. It packs a checkpoint into one file, starts
# TorchServe with it, and sends requests over HTTP. This chapter uses the model that chapter 7 trained on the reviews,
# and trains it first if it does not exist.

# %%
import json
import re
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import tutorial

from babybert.checkpoint.format import find_checkpoint, load_model
from babybert.cli import main
from babybert.config import ServeConfig
from babybert.serving.archive import check_archive, write_archive
from babybert.serving.predictor import Predictor
from babybert.serving.torchserve import TorchServe, free_ports

run = tutorial.run_folder("baby")
if not run.is_dir():
    tutorial.open_data()
    main(tutorial.pretrain_arguments("baby", 25))
checkpoint = find_checkpoint(run)
print("checkpoint:", *sorted(path.name for path in checkpoint.iterdir()))

# %% [markdown]
# ## The archive
#
# The archive (`.mar`) contains everything that is needed to answer requests: weights, tokenizer, the handler, and the
# part of this package that the handler imports. It also contains the SHA-256 of each file, and it is verified before
# it is served.

# %%
folder = tempfile.TemporaryDirectory()
archive = write_archive(checkpoint, Path(folder.name))
with zipfile.ZipFile(archive) as content:
    names = content.namelist()
served = check_archive(archive)
print(f"{archive.name}: {len(names)} files, {archive.stat().st_size / 1e6:.1f} MB, of step {served['step']}")
print(*(name for name in names if "/" not in name), sep="\n")

# %% [markdown]
# ## A server and two requests
#
# TorchServe runs in Java and starts a Python process that loads the model, the *worker*. `TorchServe` starts both on
# free ports and waits until the worker is ready. (On the command line: `babybert serve runs/demo`.) A request is a
# POST with JSON.


# %%
def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def request_counters(url: str) -> list[str]:
    with urllib.request.urlopen(url, timeout=30) as response:
        lines = response.read().decode().splitlines()
    return [line for line in lines if line.startswith("babybert_inference_requests_total")]


text = (
    "This is one of the [MASK] movies I have ever seen."
    if tutorial.is_imdb()
    else "The sheriff rides with a revolver near the [MASK]."
)
sentence_a, sentence_b = "The movie was wonderful.", "I saw it twice."
inference, management, metrics = free_ports(3)
with TorchServe(
    ServeConfig(inference_port=inference, management_port=management, metrics_port=metrics), archive
) as server:
    fill_mask = post(server.predictions_url, {"text": text, "top_k": 8})
    next_sentence = post(server.predictions_url, {"sentence_a": sentence_a, "sentence_b": sentence_b})
    deadline = time.monotonic() + 20  # the worker reports its metrics a moment later
    while len(counters := request_counters(server.metrics_url)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)

print(f"POST /predictions/babybert  text: {text}")
for candidate in fill_mask["masks"][0]["candidates"][:3]:
    print(json.dumps(candidate))
print(f"\nPOST /predictions/babybert  sentence_a: {sentence_a}  sentence_b: {sentence_b}")
print(json.dumps(next_sentence))

# %% [markdown]
# ## The same without a server
#
# The handler does little: it parses and validates the JSON and calls the same `Predictor` that the command line uses.
# So the answers are the same.

# %%
predictor = Predictor(*load_model(checkpoint))
candidates = fill_mask["masks"][0]["candidates"]
local_candidates = predictor.fill_mask([text], 8)[0]["masks"][0]["candidates"]
for from_server, local in zip(candidates, local_candidates, strict=True):
    assert from_server["token"] == local["token"]
    assert abs(from_server["score"] - local["score"]) < 1e-4
print("the same", len(local_candidates), "candidates, in the same order")

figure, axis = tutorial.pyplot.subplots(figsize=(9, 3.2), layout="constrained")
axis.bar([candidate["token"] for candidate in candidates], [candidate["score"] for candidate in candidates])
axis.set(title=text, ylabel="probability in the server's response")
tutorial.show(figure, "8_serving")

# %% [markdown]
# The quality of the answers depends only on the model (chapter 7). The server adds batching of requests that arrive
# at the same time, error responses for invalid requests (status 400 with an explanation), and Prometheus metrics. The
# metrics have counted the two requests:

# %%
for line in counters:
    print(re.sub(r",ModelName=.*}", "}", line))  # TorchServe adds more labels
assert len(counters) == 2

# %% [markdown]
# **In the package:** [`write_archive`](../../babybert/serving/archive.py),
# [`TorchServe`](../../babybert/serving/torchserve.py), [`serve`](../../babybert/serving/serve.py),
# [`Predictor`](../../babybert/serving/predictor.py), and outside it
# [`BabyBertHandler`](../../handler/babybert_handler.py), which TorchServe calls. [api.md](../api.md) documents all
# requests and responses, and [serving.md](../serving.md) how to run the server.
#
# Next: [9. Fine-tuning](9_finetuning.md)
