"""Archives read in place: nothing is extracted, members come in their order.

A folder and an archive of it give the same files. Hidden ones are left out, links lead to files of the archive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convline.errors import ConvlineError
from convline.inputs.decompression import forget_stream
from convline.inputs.input_file import InputFile, Opener, open_local
from convline.inputs.tar_archives import tar_members, tar_names
from convline.inputs.zip_archives import forget_zip, zip_members, zip_names

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".zip")
# and what else people pack images into
UNREAD = (".7z", ".rar", ".tar.zst", ".tzst", ".zst", ".tar.lz", ".tar.lz4", ".tar.z", ".gz", ".bz2", ".xz", ".lzma")


def is_archive(name: Path | str) -> bool:
    return str(name).lower().endswith(ARCHIVES)


def refuse_unread(name: Path | str) -> None:
    """Raises ConvlineError for an archive, or a compressed file, of a kind that is not read here."""
    ending = next((ending for ending in UNREAD if str(name).lower().endswith(ending)), None)
    if ending and not is_archive(name):
        read = ", ".join(ARCHIVES)
        raise ConvlineError(
            f"{name} is a {ending}, which is not read here; unpack it and give the folder, or use {read}"
        )


def read_archive(name: Path | str, prefix: str = "", open_file: Opener = open_local) -> Iterator[InputFile]:
    """The files of an archive, hidden ones left out; `open_file` opens it, here and in other processes.

    Raises ConvlineError for a damaged archive and for a member whose name leaves the archive.
    """
    members = zip_members if _is_zip(name) else tar_members
    with reading(name):
        yield from members(open_file, str(name), prefix)


def names_within(name: Path) -> Iterator[tuple[str, bool]]:
    """The path of each member, hidden ones too, and whether it is a folder. Raises ConvlineError as `read_archive`."""
    with reading(name):
        yield from (zip_names if _is_zip(name) else tar_names)(open_local, str(name))


def forget_archives() -> None:
    """Have archives opened anew: in a process that closes the files it was born with."""
    forget_stream()
    forget_zip()


def _is_zip(name: Path | str) -> bool:
    return str(name).lower().endswith(".zip")


@contextmanager
def reading(archive: Path | str) -> Iterator[None]:
    """Whatever a damaged archive makes its reader raise becomes one sentence."""
    try:
        yield
    except ConvlineError:
        raise
    # libraries of compressions and of remote file systems have exceptions of their own
    except Exception as error:
        raise ConvlineError(
            f"cannot read the archive {archive}: {str(error) or type(error).__name__}; fetch it again"
        ) from error
