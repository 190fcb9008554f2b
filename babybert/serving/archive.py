"""Pack a checkpoint into an archive (`.mar`), the file that TorchServe serves, and check one before it is served.

An archive holds all that a server needs beside TorchServe and the libraries: the weights, the tokenizer, the handler,
and the part of this package that answers. It does not matter which version of the package, if any, the server has:
TorchServe puts the unpacked archive first on the module path. The same checkpoint and package give the same bytes: what
TorchServe's archiver puts together is zipped here, without times, and without compression, which differs between
libraries. `served.json` has the SHA-256 of every file: damage is found, while who wrote the archive is not.
"""

import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import babybert
from babybert.errors import DataError, StorageError, UsageError

MODEL_NAME = "babybert"
HANDLER = "babybert_handler.py"
SERVED = "served.json"  # {"version": str, "step": int, "digest": SHA-256 of the weights, "files": {name: SHA-256}}
MANIFEST = "MAR-INF/MANIFEST.json"
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say


def handler_folder() -> Path:
    """The folder of the handler and its settings: inside an installed package, beside it in a checkout."""
    package = Path(babybert.__file__).parent
    installed = package / "handler"
    return installed if installed.is_dir() else package.parent / "handler"


def write_archive(checkpoint: Path, store: Path) -> Path:
    """Write `store/babybert.mar` from a checkpoint; the file appears whole, and replaces an older one.

    Raises DataError if the checkpoint's files are not what its manifest says, UsageError if the serving libraries are not
    installed, StorageError if the disk cannot take it.
    """
    target = store / f"{MODEL_NAME}.mar"
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _private_temporary_folder(store) as scratch:
            served = _gather(checkpoint, scratch / "content")
            pack(scratch / "content", handler_folder() / HANDLER, served, scratch)
            (scratch / target.name).replace(target)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written: {error.strerror}; make room or choose another --out"
        ) from error
    return target


def pack(content: Path, handler: Path, served: dict[str, Any], out: Path) -> Path:
    """Write `out/babybert.mar` of the files in `content`, a handler and our model settings. Raises UsageError, OSError."""
    try:
        from model_archiver.model_archiver_config import ModelArchiverConfig
        from model_archiver.model_packaging import generate_model_archive
    except ImportError as error:
        raise UsageError(
            "torch-model-archiver is not installed; run: pip install 'babybert-pretrain[serve]'"
        ) from error
    with _private_temporary_folder(out) as scratch:
        settings = ModelArchiverConfig(
            model_name=MODEL_NAME,
            handler=str(handler),
            version=served["version"],
            extra_files=str(content),
            config_file=str(handler_folder() / "model-config.yaml"),
            export_path=str(scratch),
        )
        generate_model_archive(settings)
        return _rewrite(scratch / f"{MODEL_NAME}.mar", out / f"{MODEL_NAME}.mar", served)


def _gather(checkpoint: Path, content: Path) -> dict[str, Any]:
    """Copy the model and the code into `content`, and return what `served.json` says of the model."""
    from babybert.checkpoint.format import MODEL_FILES, WEIGHTS  # PyTorch, which a server of an archive has no use for

    package = Path(babybert.__file__).parent
    _copy(package, content / "babybert")
    for name in MODEL_FILES:
        _copy(checkpoint / name, content / name)
    digests = {name: _sha256((content / name).read_bytes()) for name in MODEL_FILES}
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        step, expected = int(manifest["step"]), {name: manifest["files"][name]["sha256"] for name in MODEL_FILES}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{checkpoint}/manifest.json: not the manifest of a checkpoint ({error!r})") from error
    for name, digest in digests.items():
        if digest != expected[name]:
            raise DataError(f"{checkpoint / name}: differs from the checkpoint's manifest; choose another checkpoint")
    return {"version": f"{step}-{digests[WEIGHTS][:12]}", "step": step, "digest": digests[WEIGHTS]}


def _rewrite(archive: Path, target: Path, served: dict[str, Any]) -> Path:
    """The same archive with `served.json`, in the order of names, without anything that changes from run to run."""
    with zipfile.ZipFile(archive) as given:
        contents = {name: given.read(name) for name in given.namelist() if not name.endswith("/")}
    manifest = json.loads(contents[MANIFEST])
    del manifest["createdOn"]
    contents[MANIFEST] = json.dumps(manifest, indent=2, sort_keys=True).encode()
    files = {name: _sha256(content) for name, content in sorted(contents.items())}
    contents[SERVED] = json.dumps({**served, "files": files}, indent=2).encode()
    with zipfile.ZipFile(target, "w") as written:
        for name in sorted(contents):
            written.writestr(zipfile.ZipInfo(name, LONG_AGO), contents[name])
    return target


def check_archive(path: Path) -> dict[str, Any]:
    """What `served.json` says, if every file of the archive is the one that was packed. Raises DataError."""
    advice = "write it again with `babybert archive`"
    if not path.is_file():
        raise DataError(f"{path}: no such file; {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            if SERVED not in archive.namelist():
                raise DataError(f"{path}: not an archive of ours: it has no {SERVED}; {advice}")
            served = json.loads(archive.read(SERVED))
            names = sorted(name for name in archive.namelist() if name != SERVED)
            if names != sorted(served["files"]) or not {MANIFEST, HANDLER} <= set(names):
                raise DataError(f"{path}: holds other files than {SERVED} says; {advice}")
            for name in names:
                if _sha256(archive.read(name)) != served["files"][name]:
                    raise DataError(f"{path}: {name} is not the one that was packed; {advice}")
            return {"version": str(served["version"]), "step": int(served["step"]), "digest": str(served["digest"])}
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: damaged, or no archive ({' '.join(str(error).split()) or type(error).__name__}); {advice}"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
