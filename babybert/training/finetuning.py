"""`babybert finetune`: the task of training a classifier, and the scores at the end.

The loop, checkpoints, resume and metrics are those of pretraining (see `train.py`). A run starts from a pretrained
checkpoint's encoder and a new head. When the run is complete, its newest checkpoint is scored with intervals.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from babybert.checkpoint.format import load_classifier, load_encoder
from babybert.checkpoint.source import CheckpointSource
from babybert.config import FinetuneConfig
from babybert.data.device_loader import DeviceLoader, fits_on_device
from babybert.data.labelled_examples import LabelledData, read_labelled_data
from babybert.data.loader import Loader
from babybert.data.table import Examples
from babybert.data.tokenizer import Tokenizer
from babybert.errors import UsageError, cannot_write, os_reason
from babybert.evaluation.classification import ClassScores, class_probabilities, class_report, class_scores
from babybert.evaluation.nsp_baselines import scikit_learn
from babybert.folders import temporary_folder, write_file
from babybert.model.bert import BertEncoder
from babybert.model.classifier import ClassificationModel, ClassSums, TextClassifier
from babybert.model.device import pick_device
from babybert.model.loss import ObjectiveSums
from babybert.training.optimizer import ADAM_EPSILON, EagerAdam
from babybert.training.train import RunResult, train

logger = logging.getLogger(__name__)

FinetuneResult = RunResult[ClassScores]


@dataclass(frozen=True)
class FinetuningTask:
    """See `TrainingTask`."""

    name: ClassVar[str] = "finetune"
    sums_class: ClassVar[type[ObjectiveSums]] = ClassSums
    with_nsp: ClassVar[bool] = False

    config: FinetuneConfig
    source: BertEncoder  # the pretrained model
    model_name: str
    tokenizer: Tokenizer
    data: LabelledData

    @property
    def data_digest(self) -> str:
        """SHA-256 of the training examples and the tokenizer."""
        return self.data.digest

    @property
    def data_name(self) -> str:
        """The sources of the training texts."""
        return ", ".join(self.config.source)

    @property
    def majority(self) -> int:
        """The most frequent class of the training texts."""
        return int(np.bincount(self.data.train.is_next).argmax())

    def new_model(self) -> TextClassifier:
        """The pretrained encoder with a new head; with `from_scratch`, all weights are new."""
        sizes = replace(self.source.config, dropout=self.config.dropout, tie_decoder=False)
        model = TextClassifier(sizes, self.data.classifier)
        if not self.config.from_scratch:
            model.load_encoder(self.source)
        elif sizes.norm == "pre":
            model.initialize_normal()
        return model

    def load_model(self, folder: Path) -> TextClassifier:
        """The checkpoint's model, if the settings and the data fit it. Raises UsageError."""
        model, tokenizer = load_encoder(folder)
        if not isinstance(model, TextClassifier):
            raise UsageError(f"{folder}: is a checkpoint of pretraining; choose another --out for the classifier")
        if tokenizer.digest != self.tokenizer.digest:
            raise UsageError(f"{folder}: has another vocabulary than {self.config.checkpoint}; choose another --out")
        sizes = replace(self.source.config, dropout=self.config.dropout, tie_decoder=False)
        if (model.config, model.classifier) != (sizes, self.data.classifier):
            raise UsageError(
                f"{folder}: has sizes {model.config} and {model.classifier}, the settings ask for {sizes} and "
                f"{self.data.classifier}; choose another --out"
            )
        return model

    def with_loss(self, model: BertEncoder) -> nn.Module:
        """The classifier with its loss, which weights the classes if `balance_classes` is set."""
        assert isinstance(model, TextClassifier)
        if not self.config.balance_classes:
            return ClassificationModel(model)
        count_C = np.bincount(self.data.train.is_next, minlength=len(self.data.classifier.classes))
        return ClassificationModel(model, torch.from_numpy(count_C.sum() / (len(count_C) * np.maximum(count_C, 1))))

    def make_optimizer(self, model: BertEncoder) -> torch.optim.Optimizer:
        """AdamW. Matrices and tables decay, biases and norms do not (Devlin et al., 2019)."""
        lr, decay = self.config.lr, self.config.weight_decay
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        groups = [{**group, "factor": 1.0, "eps": ADAM_EPSILON, "lr": lr} for group in groups]
        return EagerAdam(groups, lr=lr, decoupled_weight_decay=True, fused=True)

    def make_loader(self, device: torch.device) -> Loader:
        """The training batches, made on a GPU if the texts fit next to the model."""
        config, train_examples = self.config, self.data.train
        if fits_on_device(train_examples, device):
            return DeviceLoader(train_examples, config.batch_size, config.seed, config.bucketing, None, device)
        return Loader(train_examples, config.batch_size, config.seed, config.bucketing)

    def evaluate(self, model: BertEncoder, device: torch.device, should_stop: Callable[[], bool]) -> ClassScores:
        """Score the held-out texts."""
        assert isinstance(model, TextClassifier)
        held_out = self.data.validation
        probability_PC = class_probabilities(model, held_out, self.config.batch_size, device, "validate", should_stop)
        return class_scores(probability_PC, held_out.is_next, self.majority)


def finetune(
    config: FinetuneConfig, task: FinetuningTask | None = None
) -> tuple[FinetuneResult, dict[str, Any]] | None:
    """Train a classifier; see `train`. Returns how the run ended and, if it is complete, its scores at the end.

    The scores are also in `summary.json`, under "report". Returns None on all ranks except rank 0.

    Args:
        config: the settings.
        task: what `open_task` returned for these settings, if it has been called.
    """
    if config.compare:
        scikit_learn("linear_model")  # fail before the work if it is missing
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("--compare trains a second network in one process; under torchrun, leave it out")
    task = task or open_task(config)
    result = train(config, task.source.config.width, lambda config, context: task)
    if result is not None and result.stopped_by:
        return result, {}
    scratch = None
    if config.compare:
        settings = replace(config, out=config.out / "from-scratch", from_scratch=True, compare=False, metrics=False)
        settings = replace(settings, store=None, resume="auto")
        scratch = finetune(settings, replace(task, config=settings))
    if result is None:
        return None
    if scratch is not None and scratch[0].stopped_by:
        return replace(result, stopped_by=scratch[0].stopped_by), {}
    report = final_report(config, task, result.checkpoint)
    if scratch is not None:
        report["compared"] = compare(config, task, result.checkpoint, scratch[0].checkpoint)
    _add_to_summary(config.out, report)
    return result, report


def open_task(config: FinetuneConfig) -> FinetuningTask:
    """Load the model to start from, and read the texts. Raises DataError, and errors of S3."""
    with temporary_folder("finetune") as folder:
        checkpoint = CheckpointSource(config.checkpoint).find(folder)
        source, tokenizer = load_encoder(checkpoint)
    logger.info(f"reading {', '.join(config.source)}")
    data = read_labelled_data(config, tokenizer, source.config.max_positions)
    return FinetuningTask(config, source, f"{config.checkpoint} ({checkpoint.name})", tokenizer, data)


def final_report(config: FinetuneConfig, task: FinetuningTask, checkpoint: Path) -> dict[str, Any]:
    """The scores of a checkpoint on the validation texts and, if there are any, on the test texts, for JSON."""

    def scores(examples: Examples, name: str) -> dict[str, Any]:
        probability_PC = _probabilities(config, checkpoint, examples, name)
        classes = task.data.classifier.classes
        return class_report(probability_PC, examples.is_next, classes, task.majority, config.seed)

    return {
        "checkpoint": str(checkpoint),
        "started_from": task.model_name,
        "training_texts": len(task.data.train),
        "validation": scores(task.data.validation, "validate"),
        "test": scores(task.data.test, "test") if task.data.test else None,
    }


def compare(config: FinetuneConfig, task: FinetuningTask, checkpoint: Path, from_scratch: Path) -> dict[str, Any]:
    """The scores of this and other classifiers on the test texts, or on the validation texts without any.

    `from_scratch` is the checkpoint of the same network that was trained from random weights.
    """
    # Here, because it imports SciPy.
    from babybert.evaluation import class_baselines as baselines

    data, device = task.data, pick_device(config.device)
    examples = data.test or data.validation
    predictions = {
        baselines.FINE_TUNED: _probabilities(config, checkpoint, examples, "fine-tuned").argmax(1),
        "from scratch": _probabilities(config, from_scratch, examples, "from scratch").argmax(1),
        baselines.FROZEN_PROBE: baselines.probe_predictions(
            task.source, data.train, examples, config.batch_size, device, config.seed
        ),
        baselines.BAG_OF_WORDS: baselines.bag_of_words_predictions(
            data.train, examples, task.tokenizer.size, config.seed
        ),
        "majority": np.full(len(examples), task.majority),
    }
    return baselines.compare_predictions(predictions, examples.is_next, len(data.classifier.classes), config.seed)


def _probabilities(config: FinetuneConfig, checkpoint: Path, examples: Examples, name: str) -> np.ndarray:
    """The probabilities that a checkpoint gives to the classes of each text."""
    model, _ = load_classifier(checkpoint)
    device = pick_device(config.device)
    return class_probabilities(model.set_kernels(config.kernels).to(device), examples, config.batch_size, device, name)


def _add_to_summary(run: Path, report: dict[str, Any]) -> None:
    """Write the scores at the end into `summary.json`. Raises StorageError or UsageError."""
    path = run / "summary.json"
    summary: dict[str, Any] = {}  # a complete run from S3 that was started again in another folder has none
    with contextlib.suppress(FileNotFoundError, ValueError):
        summary = json.loads(path.read_text(encoding="utf-8"))
    try:
        write_file(path, (json.dumps({**summary, "report": report}, indent=2) + "\n").encode())
    except OSError as error:
        raise cannot_write(f"{path}: cannot be written: {os_reason(error)}; the checkpoint is valid", error) from error
