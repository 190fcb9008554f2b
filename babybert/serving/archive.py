"""Write a checkpoint as a TorchServe archive (`babybert.mar`), and verify an archive before it is served.

An archive holds all that a server needs besides TorchServe and the libraries: the weights, the tokenizer, the handler
and the Python files of this package. TorchServe puts the unpacked archive first on the module path, so the version of
the package on the server, if there is one, makes no difference. The whole package is packed, though a worker imports
only a part of it: the rest costs a few hundred kilobytes on disk, and no list of modules has to be kept up to date.

Archives are reproducible: the same checkpoint and package give the same bytes. The output of TorchServe's archiver is
zipped again without times, and without compression, whose result differs between zlib versions. `served.json` holds
the SHA-256 of every file. It detects corruption; it does not authenticate the author.
"""

import glob
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
from babybert.errors import DataError, UsageError, cannot_write, os_reason
from babybert.folders import make_folder

MODEL_NAME = "babybert"
HANDLER = "babybert_handler.py"
SERVED = "served.json"  # {"version": str, "step": int, "digest": SHA-256 of the weights, "files": {name: SHA-256}}
MANIFEST = "MAR-INF/MANIFEST.json"
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that the zip format can store
ADVICE = "write it again with `babybert archive`"


def handler_folder() -> Path:
    """The folder of the handler and its settings: inside an installed package, next to the package in a checkout."""
    package = Path(babybert.__file__).parent
    installed = package / "handler"
    return installed if installed.is_dir() else package.parent / "handler"


def package_files() -> list[Path]:
    """The Python files of this package, relative to it; without the handler, which an archive has at its top."""
    package = Path(babybert.__file__).parent
    files = (path.relative_to(package) for path in package.rglob("*.py"))
    return sorted(path for path in files if path.parts[0] != "handler")


def write_archive(checkpoint: Path, store: Path, int8: bool = False) -> Path:
    """Write `store/babybert.mar` from a checkpoint and return its path. The file is replaced atomically.

    With `int8`, it also has the layers with int8 weights, with which the server answers.

    Raises DataError if the checkpoint does not match its manifest, UsageError if the serving libraries are not
    installed or the folder cannot be written, StorageError if the disk is full.
    """
    target = store / f"{MODEL_NAME}.mar"
    make_folder(store, "--out")
    try:
        with _private_temporary_folder(store) as scratch:
            content = scratch / "content"
            copy_package(content)
            served = _copy_model(checkpoint, content)
            if int8:
                _add_int8_encoder(content, served)
            pack(content, handler_folder() / HANDLER, served, scratch)
            (scratch / target.name).replace(target)
    except OSError as error:
        raise cannot_write(
            f"{target}: cannot be written: {os_reason(error)}; make room or choose another --out", error
        ) from error
    return target


def copy_package(content: Path) -> None:
    """Copy the Python files of this package to `content/babybert`. Raises OSError."""
    package = Path(babybert.__file__).parent
    for name in package_files():
        target = content / "babybert" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / name, target)


def pack(content: Path, handler: Path, served: dict[str, Any], out: Path) -> Path:
    """Write `out/babybert.mar` with the files in `content`, a handler and our `model-config.yaml`.

    `served` has the "version", "step" and "digest" of `served.json`. Raises UsageError, OSError.
    """
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
            extra_files=_archiver_pattern(content),
            config_file=str(handler_folder() / "model-config.yaml"),
            export_path=str(scratch),
        )
        generate_model_archive(settings)
        return _make_reproducible(scratch / f"{MODEL_NAME}.mar", out / f"{MODEL_NAME}.mar", served)


def _archiver_pattern(folder: Path) -> str:
    """`folder` for the archiver, which reads a comma as the end of a name and expands wildcards.

    A `?` stands for each comma. It could stand for any character, but the folder's own name is unique.
    """
    return glob.escape(str(folder.resolve())).replace(",", "?")


def check_archive(path: Path) -> dict[str, Any]:
    """The "version", "step" and "digest" of an archive, after verifying all its files. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; {ADVICE}")
    try:
        with zipfile.ZipFile(path) as archive:
            served = _verify(archive, path)
            return {"version": str(served["version"]), "step": int(served["step"]), "digest": str(served["digest"])}
    except DataError:
        raise
    except (
        # What zipfile, zlib and json raise for corrupt bytes, and the lookups for a `served.json` of another form.
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: corrupt, or not an archive ({reason}); {ADVICE}") from error


def _verify(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    """`served.json`, if the archive has exactly the files that it lists, with their digests."""
    names = set(archive.namelist())
    if SERVED not in names:
        raise DataError(f"{path}: not written by `babybert archive`: it has no {SERVED}; {ADVICE}")
    served: dict[str, Any] = json.loads(archive.read(SERVED))
    digests = served["files"]
    packed_names = sorted(name for name in archive.namelist() if name != SERVED)
    if packed_names != sorted(digests) or not {MANIFEST, HANDLER} <= names:
        raise DataError(f"{path}: its files are not those that {SERVED} lists; {ADVICE}")
    for name in packed_names:
        if _sha256(archive.read(name)) != digests[name]:
            raise DataError(f"{path}: {name} differs from its digest in {SERVED}; {ADVICE}")
    return served


def _copy_model(checkpoint: Path, content: Path) -> dict[str, Any]:
    """Copy the model files into `content`; returns the "version", "step" and "digest" of `served.json`.

    The copies are what is verified, so a checkpoint that changes meanwhile is noticed. Raises DataError.
    """
    # Here, because it imports PyTorch, which serving an archive does not need.
    from babybert.checkpoint.format import MODEL_FILES, WEIGHTS

    for name in MODEL_FILES:
        shutil.copyfile(checkpoint / name, content / name)
    digests = {name: _sha256((content / name).read_bytes()) for name in MODEL_FILES}
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        step = int(manifest["step"])
        expected_digests = {name: manifest["files"][name]["sha256"] for name in MODEL_FILES}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{checkpoint}/manifest.json: not the manifest of a checkpoint ({error!r})") from error
    for name, digest in digests.items():
        if digest != expected_digests[name]:
            raise DataError(f"{checkpoint / name}: differs from the checkpoint's manifest; choose another checkpoint")
    return {"version": f"{step}-{digests[WEIGHTS][:12]}", "step": step, "digest": digests[WEIGHTS]}


def _add_int8_encoder(content: Path, served: dict[str, Any]) -> None:
    """Write the int8 weights of the copied model, and mark the version: answers differ from those in fp32."""
    from babybert.checkpoint.format import load_encoder
    from babybert.export.onnx_graphs import check_onnx
    from babybert.serving.int8_encoder import write_int8_encoder

    check_onnx("--int8")
    write_int8_encoder(load_encoder(content)[0].eval(), content)
    served["version"] += "-int8"


def _make_reproducible(archive: Path, target: Path, served: dict[str, Any]) -> Path:
    """Copy an archive to `target` with `served.json`, its files sorted by name, and without times."""
    with zipfile.ZipFile(archive) as source:
        contents = {name: source.read(name) for name in source.namelist() if not name.endswith("/")}
    manifest = json.loads(contents[MANIFEST])
    del manifest["createdOn"]
    contents[MANIFEST] = json.dumps(manifest, indent=2, sort_keys=True).encode()
    digests = {name: _sha256(content) for name, content in sorted(contents.items())}
    contents[SERVED] = json.dumps({**served, "files": digests}, indent=2).encode()
    with zipfile.ZipFile(target, "w") as reproducible:
        for name in sorted(contents):
            reproducible.writestr(zipfile.ZipInfo(name, ZIP_EPOCH), contents[name])
    return target


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _private_temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder on the disk of `parent`, whose `tmp` is Python's default temporary folder meanwhile.

    TorchServe's archiver deletes `<temporary folder>/<model name>` before it begins, which must not be a shared folder.
    """
    previous = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".archive-", dir=parent) as folder:
        (Path(folder) / "tmp").mkdir()
        tempfile.tempdir = str(Path(folder) / "tmp")
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = previous
