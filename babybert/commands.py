"""What each command does: call the package, and print the result on standard output.

Each function takes the command's config and its positional arguments, and returns the exit code. The functions import
what they need when they run, so that `--help` and a wrong flag answer at once, without loading PyTorch.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from babybert.config import (
    EvaluateConfig,
    ExplainConfig,
    FinetuneConfig,
    InfoConfig,
    LookConfig,
    PlotConfig,
    PrepareConfig,
    PretrainConfig,
    ProbeConfig,
)
from babybert.config.command_line import convert_text
from babybert.errors import UsageError
from babybert.s3 import is_s3


def run_prepare(config: PrepareConfig, arguments: argparse.Namespace) -> int:
    """`babybert prepare`."""
    from babybert.data.dataset import unigram_entropy
    from babybert.data.prepare import prepare_data

    facts, token_counts_V = prepare_data(config)
    corpus = ""
    if "documents" in facts:
        kind = "generated reviews" if facts["generated"] else "documents"
        corpus = f"{facts['documents']:,} {kind}, {facts['tokens']:,} tokens, "
    print(f"{config.out}: {corpus}vocabulary {facts['vocabulary']:,}")
    for split in ("train", "validation"):
        statistics = facts[split]
        documents = f"{statistics['documents']:>8,} documents " if "documents" in statistics else ""
        masked = statistics["masked_tokens"] / statistics["tokens_in_pairs"]
        print(
            f"  {split:<11}{documents}{statistics['pairs']:>9,} pairs, mean length {statistics['mean_length']}, "
            f"{masked:.1%} of tokens masked"
        )
    files = facts.get("source_files", {"left_out": {}, "bad": []})
    if facts["skipped_rows"]:
        print(f"  skipped: {facts['skipped_rows']:,} bad rows")
    if files["bad"]:
        print(f"  bad files: {len(files['bad']):,}; only rows before the damage were read")
    if files["left_out"]:
        print(f"  left out: {', '.join(f'{count:,} {reason}' for reason, count in files['left_out'].items())}")
    entropy = unigram_entropy(token_counts_V)
    print(f"  MLM loss of the unigram baseline: {entropy:.3f} nats; of chance: {math.log(facts['vocabulary']):.3f}")
    return 0


def run_pretrain(config: PretrainConfig, arguments: argparse.Namespace) -> int:
    """`babybert pretrain`."""
    from babybert.evaluation.scores import format_scores
    from babybert.training.train import pretrain

    result = pretrain(config)
    if result is None:  # rank 0 prints for all ranks
        return 0
    print(f"checkpoint: {result.checkpoint}")
    if result.stopped_by:
        print("stopped before the end; the same command continues from here")
        return 128 + result.stopped_by  # as shells report a signal: 143 for SIGTERM, 130 for SIGINT
    if result.scores:
        print(format_scores(result.scores))
    return 0


def run_finetune(config: FinetuneConfig, arguments: argparse.Namespace) -> int:
    """`babybert finetune`."""
    from babybert.evaluation.classification import format_class_report
    from babybert.training.finetuning import finetune

    ending = finetune(config)
    if ending is None:  # rank 0 prints for all ranks
        return 0
    result, report = ending
    if result.stopped_by:
        print(f"checkpoint: {result.checkpoint}")
        print("stopped before the end; the same command continues from here")
        return 128 + result.stopped_by
    if config.json:
        print_json(report)
        return 0
    print(f"checkpoint: {result.checkpoint}")
    for split in ("validation", "test"):
        if report[split]:
            print(format_class_report(split, report[split]))
    if "compared" in report:
        from babybert.evaluation.class_baselines import format_comparison

        split = "test" if report["test"] else "validation"
        print(f"compared on the {split} texts\n{format_comparison(report['compared'])}")
    return 0


def run_evaluate(config: EvaluateConfig, arguments: argparse.Namespace) -> int:
    """`babybert evaluate`."""
    from babybert.evaluation.blimp_report import format_blimp, plot_blimp
    from babybert.evaluation.report_figures import plot_report
    from babybert.evaluation.report_table import format_report
    from babybert.figures import figure_paths, open_pyplot

    if config.plot:
        open_pyplot()  # these two fail before the work, not after it
        figure_paths(config.plot, "--plot")
    results = _score_blimp(config) if config.blimp else _score_held_out(config)
    format_results, plot_results = (format_blimp, plot_blimp) if config.blimp else (format_report, plot_report)
    if config.json:
        print_json(results)
    else:
        print(f"{results['checkpoint']}\n{format_results(results)}")
    if config.plot:
        for path in plot_results(results, config.plot):
            print(path, file=sys.stderr)
    return 0


def _score_held_out(config: EvaluateConfig) -> dict[str, Any]:
    """The scores on the held-out pairs."""
    from babybert.checkpoint.format import check_same_vocabulary, find_checkpoint, load_model
    from babybert.data.s3_cache import CacheLimits
    from babybert.data.s3_dataset import open_data
    from babybert.evaluation.report import report
    from babybert.model.device import pick_device
    from babybert.model.precision import evaluates_in_bf16

    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    dataset = open_data(config.data, CacheLimits(config.cache, config.cache_gb))
    model, tokenizer = load_model(folder)
    check_same_vocabulary(folder, tokenizer, dataset)
    bf16 = evaluates_in_bf16(config.precision, model, device)
    results = report(model.to(device), dataset, config.max_pairs, config.batch_size, device, bf16)
    return {"checkpoint": str(folder), **results}


def _score_blimp(config: EvaluateConfig) -> dict[str, Any]:
    """The scores on BLiMP's minimal pairs."""
    from babybert.checkpoint.format import check_same_vocabulary, find_checkpoint, load_model
    from babybert.config.evaluation_config import TOKENS_PER_PAIR
    from babybert.corpus.minimal_pairs import read_minimal_pairs
    from babybert.data.s3_cache import CacheLimits
    from babybert.data.s3_dataset import open_data
    from babybert.evaluation.blimp import evaluate_blimp
    from babybert.model.device import pick_device
    from babybert.model.precision import evaluates_in_bf16

    assert config.blimp is not None
    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    pairs = read_minimal_pairs(config.blimp)
    model, tokenizer = load_model(folder)
    train, left_out = None, []
    if is_s3(str(config.data)) or Path(config.data).exists():
        dataset = open_data(config.data, CacheLimits(config.cache, config.cache_gb))
        check_same_vocabulary(folder, tokenizer, dataset)
        train = dataset.examples("train")
    else:
        left_out = [f"the unigram and bigram baselines: {config.data}: no such folder; give the data with --data"]
    bf16 = evaluates_in_bf16(config.precision, model, device)
    batch_positions = config.batch_size * TOKENS_PER_PAIR
    results = evaluate_blimp(model.to(device), tokenizer, pairs, train, device, bf16, batch_positions)
    return {"checkpoint": str(folder), "blimp": config.blimp, **results, "left_out": left_out}


def run_probe(config: ProbeConfig, arguments: argparse.Namespace) -> int:
    """`babybert probe`."""
    from babybert.checkpoint.format import find_checkpoint, load_model
    from babybert.corpus.labelled import LabelledColumns, read_labelled, sample
    from babybert.evaluation.probe import format_probe, probe
    from babybert.model.device import pick_device
    from babybert.model.precision import evaluates_in_bf16

    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    model, tokenizer = load_model(folder)
    columns = LabelledColumns(config.text_column, config.label_column)
    documents = read_labelled(config.corpus, config.source, columns)
    train, test = sample(documents, config.documents, config.seed)
    bf16 = evaluates_in_bf16(config.precision, model, device)
    results = probe(model, tokenizer, train, test, config.positions, config.seed, config.batch_size, device, bf16)
    if config.json:
        print_json({"checkpoint": str(folder), **results})
    else:
        print(f"{folder}\n{format_probe(results)}")
    return 0


def run_look(config: LookConfig, arguments: argparse.Namespace) -> int:
    """`babybert look`."""
    from babybert.checkpoint.format import find_checkpoint, load_model
    from babybert.evaluation.look import attention_weights, encode, format_look, look
    from babybert.evaluation.report_figures import plot_attention
    from babybert.figures import figure_paths, open_pyplot

    if config.plot:
        open_pyplot()
        figure_paths(config.plot, "--plot")
    model, tokenizer = load_model(find_checkpoint(config.checkpoint))
    model = model.eval().set_kernels("plain")
    ids_1T, segments_1T = encode(model, tokenizer, config.text)
    results = look(model, tokenizer, config.words, config.among)
    if config.json:
        print_json(results)
    else:
        print(format_look(results))
    if config.plot:
        weights_LHTT = attention_weights(model, ids_1T, segments_1T)[:, 0].numpy()
        for path in plot_attention(tokenizer.tokens(ids_1T[0].tolist()), weights_LHTT, config.plot):
            print(path, file=sys.stderr)
    return 0


def run_explain(config: ExplainConfig, arguments: argparse.Namespace) -> int:
    """`babybert explain`."""
    from babybert.checkpoint.format import find_checkpoint, load_model
    from babybert.evaluation.explain import explain, format_explanation, untrained
    from babybert.evaluation.preference import compare_sentences, format_preference

    sentences = sentences_of(arguments)
    if config.checkpoint:
        folder = find_checkpoint(config.checkpoint)
        model, tokenizer = load_model(folder)
        model_name = str(folder)
    else:
        model, tokenizer = untrained(*sentences, config.seed)
        model_name = f"untrained, of the reference's sizes (weights of seed {config.seed})"
    if config.preference:
        results = compare_sentences(model.set_kernels("plain"), tokenizer, *sentences)
        text = format_preference(results, model_name)
    else:
        results = explain(model, tokenizer, *sentences, config.is_next, config.seed)
        text = format_explanation(results, model_name)
    if config.json:
        print_json({"model": model_name, **results})
    else:
        print(text)
    return 0


def run_info(config: InfoConfig, arguments: argparse.Namespace) -> int:
    """`babybert info`."""
    from babybert.info import describe, describe_ops, format_description, format_ops

    if config.ops:
        operations = describe_ops()
        if config.json:
            print_json(operations)
        else:
            print(format_ops(operations))
        return 0
    if arguments.path is None:
        raise UsageError("give a path, or --ops; see `babybert info --help`")
    description = describe(arguments.path, config)
    if config.json:
        print_json(description)
    else:
        print(format_description(description))
    return 0


def run_plot(config: PlotConfig, arguments: argparse.Namespace) -> int:
    """`babybert plot`."""
    from babybert.evaluation.curves import plot_curves

    for path in plot_curves(arguments.runs, config.out):
        print(path)
    return 0


def sentences_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """The two sentences of the command line. Raises UsageError for one that is not text."""
    return (
        convert_text(arguments.sentence_a, "the first sentence"),
        convert_text(arguments.sentence_b, "the second sentence"),
    )


def print_json(content: dict[str, Any]) -> None:
    """Print a result as indented JSON, which is valid whatever standard output can encode."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(content, indent=2)
    print(text)
