"""Which engine prepares the data: the one that the settings name, or this process alone if that is faster."""

from pathlib import Path

from babybert.config import PrepareConfig
from babybert.data.engine import Engine
from babybert.data.local_engine import InProcessEngine, LocalEngine, usable_cores
from babybert.errors import UsageError

SMALL_CORPUS_BYTES = 4_000_000  # about a second of work, for which starting processes is not worth it


def choose_engine(config: PrepareConfig, corpus_bytes: int, folder: Path) -> Engine:
    """Return an engine that has not been started.

    Args:
        config: the settings.
        corpus_bytes: about how large the corpus is.
        folder: where the engine may keep files.
    """
    workers = usable_cores() if config.workers is None else config.workers
    if config.engine == "ray":
        try:
            from babybert.data.ray_engine import RayEngine
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UsageError("--engine ray needs Ray: pip install 'babybert-pretrain[ray]'") from error
        return RayEngine(folder, config.workers if config.ray_address else workers, config.ray_address)
    if workers == 1 or corpus_bytes < SMALL_CORPUS_BYTES:
        return InProcessEngine(folder)
    return LocalEngine(folder, workers)
