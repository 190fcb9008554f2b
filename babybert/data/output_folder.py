"""A dataset in a folder of this machine.

Everything is written to `.partial/` and moved at the end, `dataset.json` last. Files that a killed command leaves are
never taken for a dataset. The next command uses the shards that are finished, and deletes the rest.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from babybert.data.dataset import SPLITS
from babybert.data.dataset_output import DESCRIPTION, PARTIAL, RECORD_SUFFIX, DatasetOutput
from babybert.data.digest import sha256
from babybert.data.engine import Engine
from babybert.data.shard_upload import UploadedShard
from babybert.errors import cannot_write, os_reason
from babybert.folders import lock_folder, write_file


class OutputFolder(DatasetOutput):
    """A folder, which is made if necessary. If a command fails, earlier data in it stays as it was."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder)
        self.work = folder / ".work"
        self.files = folder / PARTIAL
        self._folder = folder

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Lock the folder, and make and delete the temporary ones; see `DatasetOutput.open`."""
        with lock_folder(self._folder, "--out"):
            try:
                self.files.mkdir(exist_ok=True)
                shutil.rmtree(self.work, ignore_errors=True)
                self.work.mkdir()
                yield
            except OSError as error:
                problem = f"{self.address}: cannot write the data: {os_reason(error)}"
                raise cannot_write(f"{problem}; make room or choose another --out", error) from error
            finally:
                for folder in (self.files, self.work):
                    shutil.rmtree(folder, ignore_errors=True)

    def _has_dataset(self) -> bool:
        return (self._folder / DESCRIPTION).exists()

    def check_workers(self, engine: Engine) -> None:
        """Check nothing: the driver writes for workers that do not see the folder."""

    def keep(self, name: str, written: Path | UploadedShard) -> None:
        """Give the file its name; see `DatasetOutput.keep`."""
        assert isinstance(written, Path)
        written.replace(self.files / name)

    def is_kept(self, name: str, place: Any, facts: dict[str, Any]) -> bool:
        """Whether the file has the right digest; see `DatasetOutput.is_kept`."""
        path = self.files / name
        return path.is_file() and sha256(path) == facts["sha256"]

    def write_record(self, name: str, content: bytes) -> None:
        """Write it next to the shard; see `DatasetOutput.write_record`."""
        write_file(self.files / (name + RECORD_SUFFIX), content)

    def records(self) -> Iterator[tuple[str, bytes]]:
        """Read the records; see `DatasetOutput.records`."""
        for path in sorted(self.files.glob("*" + RECORD_SUFFIX)):
            yield path.name.removesuffix(RECORD_SUFFIX), path.read_bytes()

    def delete_all_except(self, names: Collection[str]) -> None:
        """Delete the other files; see `DatasetOutput.delete_all_except`."""
        kept = {*names, *(name + RECORD_SUFFIX for name in names)}
        for path in self.files.iterdir():
            if path.name not in kept:
                path.unlink()

    def publish(self, facts: dict[str, Any]) -> None:
        """Move the files to their place; see `DatasetOutput.publish`."""
        (self._folder / DESCRIPTION).unlink(missing_ok=True)
        for split in SPLITS:
            for old_shard in self._folder.glob(f"{split}-*"):
                old_shard.unlink()
        shutil.rmtree(self._folder / ".cache", ignore_errors=True)
        shards = [shard["file"] for split in SPLITS for shard in facts["shards"][split]]
        for name in (*shards, *facts["files"], DESCRIPTION):
            (self.files / name).replace(self._folder / name)
