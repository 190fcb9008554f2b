# %% [markdown]
# # 8. Serving
#
# A model is of use once others can ask it. The last step of the line packs a checkpoint into one file, starts a real
# server on it (TorchServe), and asks over HTTP. It takes chapter 7's model of the reviews (and trains it, if
# it is not there).

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
    main(tutorial.training("baby", 25))
checkpoint = find_checkpoint(run)
print("checkpoint:", *sorted(path.name for path in checkpoint.iterdir()))

# %% [markdown]
# ## One file
#
# The archive (`.mar`) has all that answers: weights, tokenizer, the handler, and the part of this package that the handler
# imports. Each file's SHA-256 is in it, and the archive is checked before it is served.

# %%
folder = tempfile.TemporaryDirectory()
archive = write_archive(checkpoint, Path(folder.name))
with zipfile.ZipFile(archive) as content:
    names = content.namelist()
served = check_archive(archive)
print(f"{archive.name}: {len(names)} files, {archive.stat().st_size / 1e6:.1f} MB, of step {served['step']}")
print(*(name for name in names if "/" not in name), sep="\n")

# %% [markdown]
# ## A server, and a question
#
# TorchServe runs in Java and starts a Python process that loads the model: the *worker*. `TorchServe` starts both on free ports
# and goes on when the worker is ready. (In daily life: `babybert serve runs/demo`.) A question is a POST with JSON.


# %%
def post(url: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def counters(url: str) -> list[str]:
    with urllib.request.urlopen(url, timeout=30) as page:
        return [
            line for line in page.read().decode().splitlines() if line.startswith("babybert_inference_requests_total")
        ]


text = (
    "This is one of the [MASK] movies I have ever seen."
    if tutorial.is_imdb()
    else "The sheriff rides with a revolver near the [MASK]."
)
a, b = "The movie was wonderful.", "I saw it twice."
inference, management, metrics = free_ports(3)
config = ServeConfig(inference_port=inference, management_port=management, metrics_port=metrics)
with TorchServe(config, archive) as server:
    answer = post(server.predictions_url, {"text": text, "top_k": 8})
    follows = post(server.predictions_url, {"sentence_a": a, "sentence_b": b})
    deadline = time.monotonic() + 20  # the worker tells its metrics a moment later
    while len(counted := counters(server.metrics_url)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)

print(f"POST /predictions/babybert  text: {text}")
for candidate in answer["masks"][0]["candidates"][:3]:
    print(json.dumps(candidate))
print(f"\nPOST /predictions/babybert  sentence_a: {a}  sentence_b: {b}")
print(json.dumps(follows))

# %% [markdown]
# ## The same without a server
#
# Between the socket and the network stands little: the handler reads the JSON, checks it, and calls the same
# `Predictor` as the command line does. So the answers are the same.

# %%
predictor = Predictor(*load_model(checkpoint))
local = predictor.fill_mask([text], 8)[0]
for over_http, here in zip(answer["masks"][0]["candidates"], local["masks"][0]["candidates"], strict=True):
    assert over_http["token"] == here["token"]
    assert abs(over_http["score"] - here["score"]) < 1e-4
print("the same", len(local["masks"][0]["candidates"]), "candidates, in the same order")

figure, axis = tutorial.pyplot.subplots(figsize=(9, 3.2), layout="constrained")
candidates = answer["masks"][0]["candidates"]
axis.bar([candidate["token"] for candidate in candidates], [candidate["score"] for candidate in candidates])
axis.set(title=text, ylabel="probability, as the server answered")
tutorial.show(figure, "8_serving")

# %% [markdown]
# How good the answer is, chapter 7 has shown; the server adds nothing to it and takes nothing away. What it does add: batches of
# questions that come at the same time, refusals of what cannot be answered (400, with a sentence that says why), and metrics
# for Prometheus, which have counted the two questions:

# %%
for line in counted:
    print(re.sub(r",ModelName=.*}", "}", line))  # TorchServe adds labels of its own
assert len(counted) == 2

# %% [markdown]
# **In the package:** [`write_archive`](../../babybert/serving/archive.py), [`TorchServe`](../../babybert/serving/torchserve.py),
# [`serve`](../../babybert/serving/serve.py), [`Predictor`](../../babybert/serving/predictor.py), and outside it
# [`BabyBertHandler`](../../handler/babybert_handler.py), which TorchServe calls. [api.md](../api.md) has all questions and
# answers, [serving.md](../serving.md) how the server is run.
#
# This is the end of the line. [Back to the table of contents](README.md)
