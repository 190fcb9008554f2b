# %% [markdown]
# # 9. Fine-tuning
#
# A pretrained model is a starting point. *Fine-tuning* goes on training it, on texts with labels, for one task. Here
# the task is *sentiment*: did the writer like the film? Five commands lead from the pretrained checkpoint of chapter 7
# to a server that answers this.
#
# This chapter reads generated reviews, with the model that has learned their language. On real reviews a model has to
# learn for longer than this tutorial takes. [finetune.md](../finetune.md#what-pretraining-is-worth) has the figures of
# one that has: 86.2 % of IMDB's test reviews are classified correctly.

# %%
import csv
import json
import math
import shlex
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tutorial

from babybert.checkpoint.format import find_checkpoint, load_classifier, load_encoder
from babybert.cli import main
from babybert.config import ClassifierConfig, ServeConfig
from babybert.corpus.demo import VERDICTS, generate_reviews
from babybert.data.classifier_input import classifier_input
from babybert.data.tokenizer import SEP
from babybert.model.classifier import TextClassifier
from babybert.serving.torchserve import TorchServe, free_ports

run = tutorial.run_folder("tiny", "demo")
if not run.is_dir():
    tutorial.open_data("demo")
    main(tutorial.pretrain_arguments("tiny", 10, "demo"))
checkpoint = find_checkpoint(run)

# %% [markdown]
# ## The input
#
# The model reads one text instead of two: `[CLS] text [SEP]`. A review is often longer than the model's input. Its
# middle is then left out, because reviewers say what they think at the start and at the end. With an input of 10
# tokens, 8 are left for the text, a quarter of them from its start:

# %%
encoder, tokenizer = load_encoder(checkpoint)
reviews = generate_reviews(1500, seed=1)
ids = np.array(tokenizer.encode(reviews[0]))
short = ClassifierConfig(classes=("neg", "pos"), pairs=False, positions=10, head_share=0.25)
short_ids, _ = classifier_input(ids, None, short)
print(len(ids), "tokens, cut to:", tokenizer.join(tokenizer.tokens(short_ids)))

assert short_ids[1:3].tolist() == ids[:2].tolist()
assert short_ids[3:].tolist() == [*ids[-6:].tolist(), SEP]

# %% [markdown]
# ## A new head
#
# The heads of pretraining are replaced by a new one. It reads the hidden state at `[CLS]`, which chapter 6 used for
# the next sentence. A dense layer is followed by the activation GELU and a second layer with one logit for each class.
# The encoder keeps what it has learned, and the head starts from random weights. So all classes are about equally
# likely, and the loss starts near ln 2 = 0.693.

# %%
torch.manual_seed(0)
classifier = TextClassifier(encoder.config, short).eval()
classifier.load_encoder(encoder)
dense, _, _, last = classifier.class_head
short_ids_1T = torch.from_numpy(short_ids.astype(np.int64))[None]
segments_1T = torch.ones_like(short_ids_1T)
with torch.inference_mode():
    cls_1D = classifier(short_ids_1T, segments_1T)[:, 0]
    logits_1C = F.linear(F.gelu(F.linear(cls_1D, dense.weight, dense.bias)), last.weight, last.bias)
    print("p(neg), p(pos):", *(f"{p:.3f}" for p in logits_1C.softmax(-1)[0].tolist()))

    assert torch.allclose(logits_1C, classifier.class_logits(short_ids_1T, segments_1T), atol=1e-5)

# %% [markdown]
# ## Command 1: train
#
# The labelled texts are a CSV file with the columns `text` and `label`. A generated review is positive if it has one of
# the words that only good films get, such as "superb". Nobody tells the model which words these are.

# %%
good_words = VERDICTS["good"]["judge"]
rows = [(text, "pos" if any(word in text.lower() for word in good_words) else "neg") for text in reviews]
folder = Path("data/demo-sentiment")
folder.mkdir(parents=True, exist_ok=True)
for name, part in (("train.csv", rows[:1000]), ("test.csv", rows[1000:])):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *part])
print(f"{rows[0][1]}: {rows[0][0][:100]}...")

# %% [markdown]
# `babybert finetune` trains all weights with the loop of chapter 7. It holds out a tenth of the texts.

# %%
classifier_run = tutorial.run_folder("tiny", "demo-sentiment")
shutil.rmtree(classifier_run, ignore_errors=True)


def babybert(*arguments: str) -> None:
    print("$ babybert", shlex.join(arguments))
    assert main(list(arguments)) == 0


source = ["--corpus", "csv", "--source", f"{folder}/train.csv", "--test-source", f"{folder}/test.csv"]
training = ["--epochs", "5", "--positions", "64", "--lr", "2e-3", "--no-metrics", "--device", "cpu"]
babybert("finetune", "--checkpoint", str(run), "--out", str(classifier_run), *source, *training)

# %% [markdown]
# `--compare` would add three other classifiers to this table: a bag of words, the same network without pretraining, and
# the pretrained model with frozen weights. A fine-tuned model is worth its cost only if it is better than these.
#
# ## Command 2: ask
#
# `babybert classify` answers for any text, without a server.

# %%
texts = ["John is wonderful as the sheriff .", "The bandits are terrible , skip it ."]
for text in texts:
    babybert("classify", text, "--checkpoint", str(classifier_run))

# %% [markdown]
# Which words decide? We leave out one word after the other. A bar is how much the difference of the two logits,
# `pos` minus `neg`, falls without that word. So a bar to the right belongs to a word that speaks for the film.

# %%
trained, tokenizer = load_classifier(find_checkpoint(classifier_run))
trained.eval()  # without dropout
negative, positive = map(trained.classifier.classes.index, ("neg", "pos"))


def logit_difference(words: list[str]) -> float:
    """The logit of `pos` minus that of `neg`: above 0 if `pos` is likelier."""
    text_ids, _ = classifier_input(np.array(tokenizer.encode(" ".join(words))), None, trained.classifier)
    ids_1T = torch.from_numpy(text_ids.astype(np.int64))[None]
    with torch.inference_mode():
        logits_C = trained.class_logits(ids_1T, torch.ones_like(ids_1T))[0]
    return float(logits_C[positive] - logits_C[negative])


sizes: list[tuple[float, str]] = []
figure, axes = tutorial.pyplot.subplots(1, len(texts), figsize=(9, 3.6), sharex=True, layout="constrained")
for axis, text in zip(axes, texts, strict=True):
    words = text.split()
    whole = logit_difference(words)
    falls = [whole - logit_difference(words[:i] + words[i + 1 :]) for i in range(len(words))]
    axis.barh(range(len(words)), falls)
    axis.set_yticks(range(len(words)), words)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(title=f"pos minus neg: {whole:.2f}", xlabel="fall of the difference without the word")
    sizes += [(abs(fall), word) for fall, word in zip(falls, words, strict=True)]
assert max(sizes)[1] in ("wonderful", "terrible", "skip")
tutorial.show(figure, "9_finetuning")

# %% [markdown]
# "wonderful" decides the first text. In the second text no word does: it is negative because a good word is missing,
# which is how the labels were made. Another run may look for bad words in place of good ones: then "terrible" decides
# the second text, and no word the first.
#
# ## Commands 3 to 5: pack, serve, request
#
# The rest is as in chapter 8. Only the request differs: it has the key `classify`. On the command line, the server is
# started with `babybert serve model-store/babybert.mar` and asked with `curl`.

# %%
model_store = classifier_run.with_name("model-store")
babybert("archive", str(classifier_run), "--out", str(model_store))
inference, management, metrics = free_ports(3)
ports = ServeConfig(inference_port=inference, management_port=management, metrics_port=metrics)
with TorchServe(ports, model_store / "babybert.mar") as server:
    body = json.dumps({"classify": texts}).encode()
    request = urllib.request.Request(server.predictions_url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        answers = json.load(response)
print("POST /predictions/babybert ", json.dumps({"classify": texts}))
print(json.dumps(answers, indent=1))

# %% [markdown]
# The probabilities are the softmax of the logits that we have computed above. With two classes, p(pos) is
# 1 / (1 + e^-d), where d is the difference:

# %%
for text, answer in zip(texts, answers, strict=True):
    by_hand = 1 / (1 + math.exp(-logit_difference(text.split())))
    print(f"{text}  server {answer['probabilities']['pos']:.4f}  by hand {by_hand:.4f}")
    assert abs(answer["probabilities"]["pos"] - by_hand) < 1e-4

# %% [markdown]
# **In the package:** [`TextClassifier`](../../babybert/model/classifier.py),
# [`classifier_input`](../../babybert/data/classifier_input.py), [`finetune`](../../babybert/training/finetuning.py),
# [`class_report`](../../babybert/evaluation/classification.py). [finetune.md](../finetune.md) documents the command,
# your own texts, and pairs of texts. [export.md](../export.md) takes the model to Transformers and ONNX.
#
# This is the end of the tutorial. [Back to the table of contents](README.md)
