"""Figures as files: matplotlib without a screen. Each figure is written as PNG, to look at, and as SVG, to print."""

from pathlib import Path
from typing import Any

from babybert.errors import StorageError, UsageError

ENDINGS = (".png", ".svg")
DOTS_PER_INCH = 110


def open_pyplot() -> Any:
    """Matplotlib's pyplot, set to draw to files. Raises UsageError where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'babybert-pretrain[plot]'") from error
    return pyplot


def save_figure(pyplot: Any, figure: Any, out: Path) -> list[Path]:
    """Write the figure to `out`.png and `out`.svg, close it, and return the two paths.

    An ending .png or .svg of `out` is dropped first. Raises StorageError when a file cannot be written.
    """
    # Not `out.with_suffix`: it would turn "v1.2" into "v1.png".
    name = out.name.removesuffix(".png").removesuffix(".svg")
    paths = [out.with_name(name + ending) for ending in ENDINGS]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written: {error.strerror}; choose another place for the figure"
        ) from error
    finally:
        pyplot.close(figure)
    return paths
