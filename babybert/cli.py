"""`babybert COMMAND`: parses the command line, runs the command, and turns errors into one line and an exit code.

Every command's settings are a dataclass of `config/`; what it does is a function of `commands.py`,
`serving_commands.py` or `export_commands.py`. Results go to standard output, progress and messages to standard error.
`errors.py` has the exit codes.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from babybert import __version__, commands, config, export_commands, serving_commands
from babybert.config.command_line import add_flags, load_config
from babybert.encoding import escape_unencodable_output
from babybert.errors import DENIED, EXIT_CRASH, EXIT_INTERRUPTED, EXIT_USAGE, FULL, UserError, os_reason
from babybert.logs import configure_logging
from babybert.proxies import bypass_proxies_for_loopback


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its settings, its function, and the help texts of its positional arguments."""

    config_class: type
    run: Callable[[Any, argparse.Namespace], int]
    arguments: dict[str, str] = dataclasses.field(default_factory=dict)


NUMBER_OF_VALUES = {"runs": "+", "path": "?", "pair": "?"}  # other arguments have one value
SENTENCES = {"sentence_a": "the first sentence", "sentence_b": "the second sentence"}
SOURCE = {"source": "the same as --source"}
CHECKPOINT = {"checkpoint": "the same as --checkpoint"}
COMMANDS = {
    "prepare": Command(config.PrepareConfig, commands.run_prepare),
    "pretrain": Command(config.PretrainConfig, commands.run_pretrain),
    "finetune": Command(config.FinetuneConfig, commands.run_finetune),
    "evaluate": Command(config.EvaluateConfig, commands.run_evaluate, CHECKPOINT),
    "probe": Command(config.ProbeConfig, commands.run_probe, CHECKPOINT),
    "look": Command(config.LookConfig, commands.run_look, CHECKPOINT),
    "explain": Command(config.ExplainConfig, commands.run_explain, SENTENCES),
    "info": Command(
        config.InfoConfig,
        commands.run_info,
        {"path": "a folder that prepare or pretrain wrote, a tokenizer.json, or one CSV or Parquet table"},
    ),
    "plot": Command(config.PlotConfig, commands.run_plot, {"runs": "one or more runs: folders or s3:// addresses"}),
    "fill-mask": Command(
        config.FillMaskConfig,
        serving_commands.run_fill_mask,
        {"text": 'a sentence with one or more [MASK], such as "the movie was [MASK]."'},
    ),
    "next-sentence": Command(config.NextSentenceConfig, serving_commands.run_next_sentence, SENTENCES),
    "classify": Command(
        config.ClassifyConfig,
        serving_commands.run_classify,
        {"text": "the text", "pair": "the second text, if the model was trained on pairs"},
    ),
    "export": Command(config.ExportConfig, export_commands.run_export, CHECKPOINT),
    "import": Command(config.ImportConfig, export_commands.run_import, SOURCE),
    "archive": Command(config.ArchiveConfig, serving_commands.run_archive, SOURCE),
    "serve": Command(config.ServeConfig, serving_commands.run_serve, SOURCE),
    "playground": Command(config.PlaygroundConfig, serving_commands.run_playground),
}


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags, and with one-line errors that point to `--help`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        flush_output()
        super().exit(status, message)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="babybert", description="Pretrain a small BERT from raw text, and serve it.")
    parser.add_argument("--version", action="version", version=f"babybert {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = (command.config_class.__doc__ or "").strip()
        variable = f"BABYBERT_{name.upper().replace('-', '_')}_<FLAG>"
        subparser = subparsers.add_parser(
            name, help=summary, description=f"{summary} Every flag is also the variable {variable}."
        )
        add_flags(subparser, command.config_class)
        _add_positional_arguments(subparser, command)
    return parser


def _add_positional_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    settings = {field.name for field in dataclasses.fields(command.config_class)}
    for name, help_text in command.arguments.items():
        if name in settings:  # a setting that may be given without its flag; if it is not, the flag's value stays
            parser.add_argument(name, help=help_text, nargs="?", default=argparse.SUPPRESS)
        else:
            parser.add_argument(name, help=help_text, nargs=NUMBER_OF_VALUES.get(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    configure_logging()
    escape_unencodable_output()
    bypass_proxies_for_loopback(os.environ)
    name = "babybert"
    try:
        arguments = make_parser().parse_args(argv)
        name = f"babybert {arguments.command}"
        command = COMMANDS[arguments.command]
        settings: Any = load_config(command.config_class, arguments.command, arguments, os.environ, COMMANDS)
        exit_code = command.run(settings, arguments)
        flush_output()
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone (`babybert ... | head`), which is no error
        _discard_output()
        return 0
    except OSError as error:
        place = "standard output" if error.filename is None else os.fsdecode(error.filename)
        if error.errno in FULL:
            _discard_output()
            print(f"{name}: error: {place}: cannot be written: {os_reason(error)}; make room", file=sys.stderr)
            return EXIT_CRASH
        if error.errno in DENIED and error.filename is not None:
            print(f"{name}: error: {place}: {os_reason(error)}; choose another path", file=sys.stderr)
            return EXIT_USAGE
        raise
    return exit_code


def flush_output() -> None:
    """Write what is still buffered, here and not at exit, where an error would be a traceback. Raises OSError."""
    if sys.stdout is not None:  # it may be closed when the process starts
        sys.stdout.flush()


def _discard_output() -> None:
    """Send what is still buffered to /dev/null: Python writes it at exit once more, which would raise again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
