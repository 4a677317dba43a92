"""Archive formats that are read (zip, tar, tar.gz, tar.bz2, tar.xz): add a new one here.

Archives are read in place: nothing is extracted to disk, and members come in archive order. An archive gives the same
files as the folder it was made from: hidden files are skipped, and links lead to other files of the archive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convline.errors import ConvlineError
from convline.inputs.decompression import close_stream
from convline.inputs.input_file import InputFile, Opener, open_local
from convline.inputs.tar_archives import tar_members, tar_paths
from convline.inputs.zip_archives import close_zip, zip_members, zip_paths

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".zip")
# archives and compressed files that are named in an error message
UNSUPPORTED_ARCHIVES = (".7z", ".rar", ".tar.zst", ".tzst", ".zst", ".tar.lz", ".tar.lz4", ".tar.z", ".gz", ".bz2",
                        ".xz", ".lzma")  # fmt: skip


def is_archive(name: Path | str) -> bool:
    return str(name).lower().endswith(ARCHIVES)


def refuse_unsupported_archive(name: Path | str) -> None:
    """Raises ConvlineError for an archive, or a compressed file, of a format that is not supported."""
    ending = next((ending for ending in UNSUPPORTED_ARCHIVES if str(name).lower().endswith(ending)), None)
    if ending and not is_archive(name):
        supported = ", ".join(ARCHIVES)
        raise ConvlineError(
            f"{name} is a {ending} file, which is not supported; unpack it and give the folder, or use {supported}"
        )


def read_archive(name: Path | str, prefix: str = "", open_file: Opener = open_local) -> Iterator[InputFile]:
    """The files of an archive, without hidden ones; `open_file` opens it, in this process and in others.

    Raises ConvlineError for a damaged archive and for a member whose path leaves the archive.
    """
    members = zip_members if _is_zip(name) else tar_members
    with _explain_archive_errors(name):
        yield from members(open_file, str(name), prefix)


def archive_paths(name: Path) -> Iterator[tuple[str, bool]]:
    """The path of each member, hidden ones too, and whether it is a folder. Raises ConvlineError as `read_archive`."""
    with _explain_archive_errors(name):
        yield from (zip_paths if _is_zip(name) else tar_paths)(open_local, str(name))


def close_archives() -> None:
    """Close the archives that are kept open; the next read opens them again.

    A forked process must do this before it closes the file descriptors that it inherited.
    """
    close_stream()
    close_zip()


def _is_zip(name: Path | str) -> bool:
    return str(name).lower().endswith(".zip")


@contextmanager
def _explain_archive_errors(archive: Path | str) -> Iterator[None]:
    """Turn any exception that a damaged archive causes into a ConvlineError."""
    try:
        yield
    except ConvlineError:
        raise
    # decompressors and remote file systems raise exceptions of their own
    except Exception as error:
        raise ConvlineError(
            f"cannot read the archive {archive}: {str(error) or type(error).__name__}; fetch it again"
        ) from error
