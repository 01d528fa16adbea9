"""Files of a public data set, wherever they lie: plain, gzipped, or in a zip archive."""

import gzip
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import final

from foretaste.errors import SourceError


@final
class Files:
    """The files of one folder, and of the zip archives in it, by their bare names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether `read(name)` would find a file."""
        return self._plain(name) is not None or self._member(name) is not None

    def read(self, name: str) -> bytes:
        """Return the content of `name`, of `name.gz`, or of the member `…/name` of an archive.

        Raises:
            SourceError: None of them is there, or it is broken.
        """
        try:
            if path := self._plain(name):
                content = path.read_bytes()
                return gzip.decompress(content) if path.suffix == ".gz" else content
            if found := self._member(name):
                archive, member = found
                with zipfile.ZipFile(archive) as opened:
                    return opened.read(member)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise SourceError(
                f"{name} in {self.folder} is broken ({error}): delete it and get it again"
            ) from error
        broken = "".join(f"; {path.name} there is no whole archive" for path in self.broken())
        raise SourceError(
            f"{self.folder} has no {name}, {name}.gz or archive that holds it{broken}"
        )

    def text(self, name: str) -> str:
        """Return the content of `name` as text: UTF-8, or Latin-1 as in the older data sets."""
        content = self.read(name)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")

    def _plain(self, name: str) -> Path | None:
        paths = (self.folder / name, self.folder / f"{name}.gz")
        return next((path for path in paths if path.is_file()), None)

    def broken(self) -> list[Path]:
        """Return the zip archives that are none, or not whole."""
        return [path for path in self._archives() if not zipfile.is_zipfile(path)]

    def _archives(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.zip") if path.is_file())

    def _member(self, name: str) -> tuple[Path, str] | None:
        for archive in self._archives():
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as opened:
                    for member in opened.namelist():
                        if PurePosixPath(member).name == name:
                            return archive, member
        return None
