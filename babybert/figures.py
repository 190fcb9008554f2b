"""Figures as files: matplotlib without a screen. Each figure is written as PNG, to look at, and as SVG, to print."""

import io
from pathlib import Path
from typing import Any

from babybert.encoding import printable
from babybert.errors import UsageError, cannot_write, os_reason
from babybert.folders import make_folder, write_file

ENDINGS = (".png", ".svg")
DOTS_PER_INCH = 110


def open_pyplot() -> Any:
    """Matplotlib's pyplot, set to draw to files. Raises UsageError where matplotlib is missing or cannot start."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'babybert-pretrain[plot]'") from error
    except OSError as error:  # it keeps a list of the fonts in a folder
        raise UsageError(
            f"matplotlib cannot start: {os_reason(error)}; set MPLCONFIGDIR to a folder that can be written"
        ) from error
    return pyplot


def figure_paths(out: Path, flag: str) -> list[Path]:
    """`out`.png and `out`.svg. Their folder is made if it does not exist.

    An ending .png or .svg of `out` is dropped first. Raises UsageError that names `flag`, the setting with this path,
    if `out` has no name or its folder cannot be written.
    """
    # Not `out.with_suffix`: it would turn "v1.2" into "v1.png".
    name = out.name.removesuffix(".png").removesuffix(".svg")
    if not name.strip("."):
        raise UsageError(f"{out}: is not the name of a figure; choose another {flag}")
    make_folder(out.parent, flag)
    return [out.with_name(name + ending) for ending in ENDINGS]


def save_figure(pyplot: Any, figure: Any, out: Path, flag: str = "--out") -> list[Path]:
    """Write the figure to `figure_paths`, close it, and return the paths.

    Raises UsageError if the figure cannot be written there, StorageError if the disk is full.
    """
    try:
        paths = figure_paths(out, flag)
        for path in paths:
            content = io.BytesIO()
            figure.savefig(content, format=path.suffix[1:], dpi=DOTS_PER_INCH)
            write_file(path, content.getvalue())
    except OSError as error:
        raise cannot_write(f"{out}: cannot be written: {os_reason(error)}; choose another {flag}", error) from error
    finally:
        pyplot.close(figure)
    return paths


def literal(text: str) -> str:
    """`text` such that matplotlib draws it as it is.

    Matplotlib reads what is between two dollar signs as a formula, leaves out of a legend what begins with an
    underscore, and cannot draw bytes that are not text.
    """
    escaped = printable(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
