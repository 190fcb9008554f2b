"""`babybert COMMAND`: parses, calls, prints. Every command's settings are a dataclass of `config.py`.

Results go to standard output, progress and messages to standard error. Errors that the user can put right are one
line, and the exit code says what kind they are (see `errors.py`).
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from babybert import __version__
from babybert.config import (
    ArchiveConfig,
    EvaluateConfig,
    ExplainConfig,
    FillMaskConfig,
    InfoConfig,
    LookConfig,
    NextSentenceConfig,
    PlaygroundConfig,
    PlotConfig,
    PrepareConfig,
    PretrainConfig,
    ProbeConfig,
    ServeConfig,
)
from babybert.errors import EXIT_INTERRUPTED, UsageError, UserError
from babybert.logs import configure_logging
from babybert.settings import add_flags, fill

# The commands import what they need when they run: `--help` and a wrong flag answer at once, without loading PyTorch.


def prepare(config: PrepareConfig, arguments: argparse.Namespace) -> int:
    from babybert.data.dataset import open_dataset, unigram_entropy
    from babybert.data.prepare import prepare as prepare_data

    facts = prepare_data(config)
    kind = "generated reviews" if facts["generated"] else "documents"
    corpus = f"{facts['documents']:,} {kind}, {facts['tokens']:,} tokens, " if "documents" in facts else ""
    print(f"{config.out}: {corpus}vocabulary {facts['vocabulary']:,}")
    for split in ("train", "validation"):
        own = facts[split]
        masked = own["masked_tokens"] / own["tokens_in_pairs"]
        documents = f"{own['documents']:>8,} documents " if "documents" in own else ""
        print(
            f"  {split:<11}{documents}{own['pairs']:>9,} pairs, mean length {own['mean_length']}, {masked:.1%} of tokens masked"
        )
    if facts["skipped_rows"]:
        print(f"  skipped: {facts['skipped_rows']:,} bad rows or files")
    entropy = unigram_entropy(open_dataset(config.out).token_counts())
    print(
        f"  a model that knew only word counts would reach an MLM loss of {entropy:.3f} nats; chance is {math.log(facts['vocabulary']):.3f}"
    )
    return 0


def pretrain(config: PretrainConfig, arguments: argparse.Namespace) -> int:
    from babybert.training.train import pretrain as train

    outcome = train(config)
    if outcome is None:  # the first process of several speaks for all
        return 0
    print(f"checkpoint: {outcome.checkpoint}")
    if outcome.stopped_by:
        print("stopped before the end; the same command goes on from here")
        return 128 + outcome.stopped_by
    if outcome.scores:
        print(outcome.scores.table())
    return 0


def evaluate(config: EvaluateConfig, arguments: argparse.Namespace) -> int:
    from babybert.checkpoint.format import check_same_vocabulary, find_checkpoint, load_model
    from babybert.data.dataset import open_dataset
    from babybert.evaluation.report import report
    from babybert.evaluation.report_figures import plot_report
    from babybert.evaluation.report_table import show
    from babybert.figures import open_pyplot
    from babybert.model.device import pick_device

    if config.plot:
        open_pyplot()  # if it is missing, that is better known before the work
    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    dataset = open_dataset(config.data)
    model, tokenizer = load_model(folder)
    check_same_vocabulary(folder, tokenizer, dataset)
    found = report(model.to(device), dataset, config.max_pairs, config.batch_size, device)
    print(json.dumps({"checkpoint": str(folder), **found}, indent=2) if config.json else f"{folder}\n{show(found)}")
    if config.plot:
        for path in plot_report(found, config.plot):
            print(path, file=sys.stderr)
    return 0


def probe(config: ProbeConfig, arguments: argparse.Namespace) -> int:
    from babybert.checkpoint.format import find_checkpoint, load_model
    from babybert.corpus.labelled import read_labelled, sample
    from babybert.evaluation.probe import probe as run_probe
    from babybert.evaluation.probe import show
    from babybert.model.device import pick_device

    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    model, tokenizer = load_model(folder)
    documents = read_labelled(config.corpus, config.source, config.text_column, config.label_column)
    train, test = sample(documents, config.documents, config.seed)
    found = run_probe(model, tokenizer, train, test, config.positions, config.seed, config.batch_size, device)
    print(json.dumps({"checkpoint": str(folder), **found}, indent=2) if config.json else f"{folder}\n{show(found)}")
    return 0


def look(config: LookConfig, arguments: argparse.Namespace) -> int:
    from babybert.evaluation.look import attention_weights, encode, show
    from babybert.evaluation.look import look as look_into
    from babybert.evaluation.report_figures import plot_attention
    from babybert.figures import open_pyplot

    if config.plot:
        open_pyplot()
    predictor = _predictor(config.checkpoint)
    ids_1T, segments_1T = encode(predictor.model, predictor.tokenizer, config.text)
    found = look_into(predictor, config.words, config.among)
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else show(found))
    if config.plot:
        weights_LHTT = attention_weights(predictor.model, ids_1T, segments_1T)[:, 0].numpy()
        for path in plot_attention(predictor.tokenizer.tokens(ids_1T[0].tolist()), weights_LHTT, config.plot):
            print(path, file=sys.stderr)
    return 0


def explain(config: ExplainConfig, arguments: argparse.Namespace) -> int:
    from babybert.checkpoint.format import find_checkpoint, load_model
    from babybert.evaluation.explain import explain as explain_example
    from babybert.evaluation.explain import show, untrained

    sentences = arguments.sentence_a, arguments.sentence_b
    if config.checkpoint:
        folder = find_checkpoint(config.checkpoint)
        (model, tokenizer), whose = load_model(folder), str(folder)
    else:
        (model, tokenizer), whose = (
            untrained(*sentences, config.seed),
            f"untrained, of the reference's sizes (weights of seed {config.seed})",
        )
    found = explain_example(model, tokenizer, *sentences, config.is_next, config.seed)
    print(json.dumps({"model": whose, **found}, indent=2, ensure_ascii=False) if config.json else show(found, whose))
    return 0


def info(config: InfoConfig, arguments: argparse.Namespace) -> int:
    from babybert.info import describe, describe_ops, format_ops, show

    if config.ops:
        choices = describe_ops()
        print(json.dumps(choices, indent=2) if config.json else format_ops(choices))
        return 0
    if arguments.path is None:
        raise UsageError("give a path, or --ops; see `babybert info --help`")
    found = describe(Path(arguments.path), config)
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else show(found))
    return 0


def plot(config: PlotConfig, arguments: argparse.Namespace) -> int:
    from babybert.evaluation.curves import plot as draw

    for path in draw([Path(run) for run in arguments.runs], config.out):
        print(path)
    return 0


def fill_mask(config: FillMaskConfig, arguments: argparse.Namespace) -> int:
    answer = _predictor(config.checkpoint).fill_mask([arguments.text], config.top_k, config.targets or None)[0]
    if config.json:
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return 0
    for mask in answer["masks"]:
        if len(answer["masks"]) > 1:
            print(f"mask at token {mask['position']}:")
        for candidate in mask["candidates"]:
            print(f"{candidate['score']:7.1%}  {candidate['token']:<16} {candidate['sequence']}")
    return 0


def next_sentence(config: NextSentenceConfig, arguments: argparse.Namespace) -> int:
    answer = _predictor(config.checkpoint).next_sentence([(arguments.sentence_a, arguments.sentence_b)])[0]
    verdict = "B follows A" if answer["is_next"] else "B does not follow A"
    print(
        json.dumps(answer, indent=2)
        if config.json
        else f'{verdict}: the model gives {answer["probability"]:.1%} to "B is the next sentence"'
    )
    return 0


def archive(config: ArchiveConfig, arguments: argparse.Namespace) -> int:
    from babybert.checkpoint.source import CheckpointSource
    from babybert.serving.archive import check_archive, write_archive

    with tempfile.TemporaryDirectory() as folder:
        path = write_archive(CheckpointSource(config.source).find(Path(folder)), config.out)
    print(
        f"{path}: version {check_archive(path)['version']}, {path.stat().st_size / 1e6:.1f} MB; serve it with `babybert serve {path}`"
    )
    return 0


def serve(config: ServeConfig, arguments: argparse.Namespace) -> int:
    from babybert.serving.serve import serve as run_server

    return run_server(config)


def playground(config: PlaygroundConfig, arguments: argparse.Namespace) -> int:
    try:
        from babybert.playground.app import playground as run_playground
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError("the page needs starlette and uvicorn: pip install 'babybert-pretrain[playground]'") from error
    return run_playground(config)


def _predictor(checkpoint: Path) -> Any:
    from babybert.checkpoint.format import find_checkpoint
    from babybert.serving.predictor import Predictor

    return Predictor.load(find_checkpoint(checkpoint))


COMMANDS: dict[str, tuple[type, Callable[[Any, argparse.Namespace], int], dict[str, str]]] = {
    "prepare": (PrepareConfig, prepare, {}),
    "pretrain": (PretrainConfig, pretrain, {}),
    "evaluate": (EvaluateConfig, evaluate, {}),
    "probe": (ProbeConfig, probe, {}),
    "look": (LookConfig, look, {}),
    "explain": (ExplainConfig, explain, {"sentence_a": "the first sentence", "sentence_b": "the second one"}),
    "info": (
        InfoConfig,
        info,
        {"path": "a folder that prepare or pretrain wrote, a tokenizer.json, or one CSV or Parquet table"},
    ),
    "plot": (PlotConfig, plot, {"runs": "a run's folder, or several of them"}),
    "fill-mask": (
        FillMaskConfig,
        fill_mask,
        {"text": 'a sentence with one or more [MASK], such as "the movie was [MASK]."'},
    ),
    "next-sentence": (
        NextSentenceConfig,
        next_sentence,
        {"sentence_a": "the first sentence", "sentence_b": "the one that may follow it"},
    ),
    "archive": (ArchiveConfig, archive, {"source": "the same as --source"}),
    "serve": (ServeConfig, serve, {"source": "the same as --source"}),
    "playground": (PlaygroundConfig, playground, {}),
}


class Parser(argparse.ArgumentParser):
    """argparse, but flags are not abbreviated, and an error is one line that says where help is, as all of ours do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="babybert", description="Pretrain a small BERT from raw text, and serve it.")
    parser.add_argument("--version", action="version", version=f"babybert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (config_class, _, texts) in COMMANDS.items():
        summary = (config_class.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary} Every flag is also the variable BABYBERT_{name.upper().replace('-', '_')}_<FLAG>.",
        )
        add_flags(command, config_class)
        for argument, text in texts.items():
            if argument in (
                field.name for field in dataclasses.fields(config_class)
            ):  # a setting that may be given without its flag
                command.add_argument(argument, help=text, nargs="?", default=argparse.SUPPRESS)
            else:
                nargs = {"runs": "+", "path": "?"}.get(argument)  # `info --ops` needs no path
                command.add_argument(argument, help=text, nargs=nargs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    configure_logging()
    arguments = make_parser().parse_args(argv)
    config_class, run, _ = COMMANDS[arguments.command]
    try:
        return run(fill(config_class, arguments.command, arguments, os.environ), arguments)
    except UserError as error:
        print(f"babybert {arguments.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"babybert {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`babybert ... | head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
