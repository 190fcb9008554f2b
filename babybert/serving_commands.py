"""What the commands that ask a model or serve it do; the others are in `commands.py`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from babybert.commands import print_json, sentences_of
from babybert.config import (
    ArchiveConfig,
    ClassifyConfig,
    FillMaskConfig,
    NextSentenceConfig,
    PlaygroundConfig,
    ServeConfig,
)
from babybert.config.command_line import convert_text
from babybert.errors import UsageError

if TYPE_CHECKING:
    from babybert.serving.predictor import Predictor


def run_fill_mask(config: FillMaskConfig, arguments: argparse.Namespace) -> int:
    """`babybert fill-mask`."""
    from babybert.tables import escape_control_characters

    text = convert_text(arguments.text, "the text")
    answer = _load_predictor(config.checkpoint).fill_mask([text], config.top_k, config.targets or None)[0]
    if config.json:
        print_json(answer)
        return 0
    for mask in answer["masks"]:
        if len(answer["masks"]) > 1:
            print(f"mask at token {mask['position']}:")
        for candidate in mask["candidates"]:
            line = f"{candidate['score']:7.1%}  {candidate['token']:<16} {candidate['sequence']}"
            print(escape_control_characters(line))
    return 0


def run_next_sentence(config: NextSentenceConfig, arguments: argparse.Namespace) -> int:
    """`babybert next-sentence`."""
    answer = _load_predictor(config.checkpoint).next_sentence([sentences_of(arguments)])[0]
    if config.json:
        print_json(answer)
    else:
        verdict = "B follows A" if answer["is_next"] else "B does not follow A"
        print(f'{verdict}: the model gives {answer["probability"]:.1%} to "B is the next sentence"')
    return 0


def run_classify(config: ClassifyConfig, arguments: argparse.Namespace) -> int:
    """`babybert classify`."""
    from babybert.tables import escape_control_characters

    pair = None if arguments.pair is None else convert_text(arguments.pair, "the second text")
    predictor = _load_predictor(config.checkpoint)
    answer = predictor.classify([(convert_text(arguments.text, "the text"), pair)], config.truncate)[0]
    if config.json:
        print_json(answer)
        return 0
    ranked = sorted(answer["probabilities"].items(), key=lambda entry: -entry[1])
    for label, probability in ranked:
        print(escape_control_characters(f"{probability:7.1%}  {label}"))
    return 0


def run_archive(config: ArchiveConfig, arguments: argparse.Namespace) -> int:
    """`babybert archive`."""
    from babybert.checkpoint.source import CheckpointSource
    from babybert.export.onnx_graphs import check_onnx
    from babybert.folders import make_folder, temporary_folder
    from babybert.serving.archive import check_archive, write_archive

    make_folder(config.out, "--out")  # fails before a checkpoint is downloaded, not after it
    if config.int8:
        check_onnx("--int8")
    with temporary_folder("archive") as folder:
        checkpoint = CheckpointSource(config.source).find(folder)
        report = _int8_reporter(checkpoint, config)  # fails before an archive is replaced, not after it
        path = write_archive(checkpoint, config.out, config.int8)
    if report:
        print(report(path))
    megabytes = path.stat().st_size / 1e6
    print(
        f"{path}: version {check_archive(path)['version']}, {megabytes:.1f} MB; serve it with `babybert serve {path}`"
    )
    return 0


def _int8_reporter(checkpoint: Path, config: ArchiveConfig) -> Callable[[Path], str] | None:
    """A function from the archive to the report that `--data` asks for."""
    if config.data is None:
        return None
    # Here, because the image for serving has no libraries for data.
    from babybert.export.int8_report import archive_report, data_of_checkpoint

    dataset = data_of_checkpoint(checkpoint, config.data)
    return lambda archive: archive_report(archive, dataset, config.validation_pairs)


def run_serve(config: ServeConfig, arguments: argparse.Namespace) -> int:
    """`babybert serve`."""
    from babybert.serving.serve import serve

    return serve(config)


def run_playground(config: PlaygroundConfig, arguments: argparse.Namespace) -> int:
    """`babybert playground`."""
    try:
        from babybert.playground.app import playground
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError("the page needs starlette and uvicorn: pip install 'babybert-pretrain[playground]'") from error
    return playground(config)


def _load_predictor(checkpoint: Path) -> "Predictor":
    from babybert.checkpoint.format import find_checkpoint
    from babybert.serving.predictor import Predictor

    return Predictor.load(find_checkpoint(checkpoint))
