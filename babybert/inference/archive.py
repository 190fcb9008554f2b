"""Pack a checkpoint into `babybert.mar`, the file that TorchServe serves.

An archive holds all that a server needs beside TorchServe and the libraries: the weights, the tokenizer, the handler,
and the part of this package that answers. It does not matter which version of the package, if any, the server has:
TorchServe puts the unpacked archive first on the module path.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import babybert
from babybert.errors import StorageError, UsageError
from babybert.model.saved import MODEL_FILES, WEIGHTS

MODEL_NAME = "babybert"
SERVED = "served.json"  # which model it is: {"version": str, "step": int, "digest": SHA-256 of the weights}
# What the handler imports, and nothing of training.
PACKAGE_PARTS = (
    "__init__.py",
    "config.py",
    "errors.py",
    "data/__init__.py",
    "data/tokenizer.py",
    "model",
    "inference/__init__.py",
    "inference/predictor.py",
    "inference/requests.py",
)


def handler_folder() -> Path:
    """The folder of the handler and its settings: inside an installed package, beside it in a checkout."""
    package = Path(babybert.__file__).parent
    installed = package / "handler"
    return installed if installed.is_dir() else package.parent / "handler"


def write_archive(checkpoint: Path, store: Path) -> Path:
    """Write `store/babybert.mar` from a verified checkpoint; the file appears whole, and replaces an older one.

    Raises UsageError if the serving libraries are not installed, StorageError if the disk cannot take it.
    """
    try:
        from model_archiver.model_archiver_config import ModelArchiverConfig
        from model_archiver.model_packaging import generate_model_archive
    except ImportError as error:
        raise UsageError("torch-model-archiver is not installed; run: pip install 'babybert-pretrain[serve]'") from error
    package, handler = Path(babybert.__file__).parent, handler_folder()
    target = store / f"{MODEL_NAME}.mar"
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _private_temporary_folder(store) as scratch:
            content = scratch / "content"
            for part in PACKAGE_PARTS:
                _copy(package / part, content / "babybert" / part)
            for name in MODEL_FILES:
                _copy(checkpoint / name, content / name)
            served = describe(checkpoint)
            (content / SERVED).write_text(json.dumps(served), encoding="utf-8")
            settings = ModelArchiverConfig(
                model_name=MODEL_NAME,
                handler=str(handler / "babybert_handler.py"),
                version=served["version"],
                extra_files=str(content),
                config_file=str(handler / "model-config.yaml"),
                export_path=str(scratch),
            )
            generate_model_archive(settings)
            (scratch / target.name).replace(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror}; make room or choose another --out") from error
    return target


def describe(checkpoint: Path) -> dict[str, Any]:
    """What `served.json` says of a checkpoint."""
    digest = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    step = int(checkpoint.resolve().name.removeprefix("step-"))
    return {"version": f"{step}-{digest[:12]}", "step": step, "digest": digest}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


@contextmanager
def _private_temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder on the disk of `beside` that is also the archiver's temporary folder.

    The archiver deletes `<temporary folder>/<model name>` before it begins: it must not be one that anybody shares.
    """
    former = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".archive-", dir=beside) as folder:
        (Path(folder) / "tmp").mkdir()
        tempfile.tempdir = str(Path(folder) / "tmp")
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = former
