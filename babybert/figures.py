"""Pictures as files: matplotlib without a screen, each picture as PNG to look at and SVG to print."""

from pathlib import Path
from typing import Any

from babybert.errors import StorageError, UsageError


def open_pyplot() -> Any:
    """Matplotlib's pyplot. Raises UsageError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("a picture needs matplotlib: pip install 'babybert-pretrain[plot]'") from error
    return pyplot


def save_figure(pyplot: Any, figure: Any, out: Path) -> list[Path]:
    """Write `out`.png and `out`.svg, close the figure, and return the two. Raises StorageError."""
    # Not with_suffix: "v1.2" would lose its ".2".
    name = out.name.removesuffix(".png").removesuffix(".svg")
    written = [out.with_name(name + ending) for ending in (".png", ".svg")]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in written:
            figure.savefig(path, dpi=110)
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written: {error.strerror}; choose another place for the picture"
        ) from error
    finally:
        pyplot.close(figure)
    return written
