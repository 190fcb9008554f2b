"""What `babybert export` and `babybert import` do."""

import argparse

from babybert.config import ExportConfig, ImportConfig


def run_export(config: ExportConfig, arguments: argparse.Namespace) -> int:
    """`babybert export`."""
    from babybert.checkpoint.source import CheckpointSource
    from babybert.export.folder import new_export_folder
    from babybert.folders import temporary_folder

    with temporary_folder("export") as folder, new_export_folder(config.out, config.overwrite) as out:
        if config.format == "transformers":
            from babybert.export.transformers_folder import write_transformers_folder

            write_transformers_folder(CheckpointSource(config.checkpoint).find(folder), out)
            report = None
        else:
            from babybert.export.int8_report import graph_report
            from babybert.export.onnx_folder import write_onnx_folder
            from babybert.export.onnx_graphs import check_onnx

            check_onnx("--format onnx")  # fails before a checkpoint is downloaded, not after it
            write_onnx_folder(CheckpointSource(config.checkpoint).find(folder), out, config.int8)
            report = graph_report(out, config.data, config.validation_pairs) if config.data else None
    if report:
        print(report)
    print(f"{config.out}: written; {config.out / 'README.md'} says how to use it")
    return 0


def run_import(config: ImportConfig, arguments: argparse.Namespace) -> int:
    """`babybert import`."""
    from babybert.export.import_checkpoint import import_checkpoint

    checkpoint = import_checkpoint(config.source, config.out)
    print(f"{checkpoint}: written; use it as a checkpoint, or go on with `babybert pretrain --init-from {config.out}`")
    return 0
