"""Remote files on S3, Google Cloud Storage and behind other URLs (s3://…, gs://…, memory://…), read through fsspec.

Each scheme needs the package that fsspec uses for it, such as s3fs. That package does the retries; none are added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from convline.errors import ConvlineError, ImageError
from convline.inputs.archives import is_archive, read_archive, refuse_unsupported_archive
from convline.inputs.input_file import FileVersion, InputFile, check_size, unreadable_file

VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified", "created")  # of fsspec's `info`, in order of preference


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL; `listed_version` is its version by the listing, if a listing was made."""

    url: str
    listed_version: FileVersion | None = None

    def read(self) -> bytes:
        try:
            system, path = open_file_system(self.url)
            size = self.listed_version[0] if self.listed_version is not None else system.size(path)
            if size is not None:
                check_size(size)
            return system.cat_file(path)
        except ImageError:
            raise
        # each file system raises exceptions of its own
        except Exception as error:
            raise ImageError("unreadable", str(error) or type(error).__name__) from error

    def version(self) -> FileVersion | None:
        return self.listed_version


def open_file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises ConvlineError if a package is missing."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ConvlineError(f"{url} needs fsspec: pip install 'convline[remote]'") from error
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConvlineError(f"cannot open {url}: {error}") from error


def open_url(url: str) -> IO[bytes]:
    """The `Opener` of remote files; reads fetch only what they need. Raises ConvlineError as `open_file_system`."""
    system, path = open_file_system(url)
    file: IO[bytes] = system.open(path, "rb")
    return file


def find_remote(url: str, is_prefixed: bool) -> Iterator[InputFile]:
    """The files at a URL, which is a file, a folder, a glob or an archive. Raises ConvlineError if there are none."""
    system, path = open_file_system(url)
    with _explain_listing_errors(url):
        matches = _glob(system, path) if "*" in path or "?" in path else [path]
        infos = [system.info(match) for match in matches]
    if not infos:
        raise ConvlineError(f"nothing matches {url}; is the pattern right?")
    if matches == [path] and infos[0]["type"] != "directory":
        refuse_unsupported_archive(url)
    urls = [url] if matches == [path] else [system.unstrip_protocol(match) for match in matches]
    return _files_of_urls(system, list(zip(urls, infos, strict=True)), is_prefixed or urls != [url])


def _glob(system: Any, pattern: str) -> list[str]:
    return sorted(system.glob(pattern), key=lambda match: match.encode("utf-8", "surrogateescape").split(b"/"))


def _files_of_urls(system: Any, urls: list[tuple[str, dict[str, Any]]], is_prefixed: bool) -> Iterator[InputFile]:
    for url, info in urls:
        prefix = url.rstrip("/") + "/" if is_prefixed else ""
        if info["type"] == "directory":
            yield from _walk(system, info["name"], prefix)
        elif is_archive(url):
            yield from read_archive(url, prefix, open_url)
        else:
            yield InputFile(url if is_prefixed else url.rpartition("/")[2], _remote_file(system, info))


def _walk(system: Any, folder: str, prefix: str) -> Iterator[InputFile]:
    """Depth first, each folder's names sorted by their bytes."""
    try:
        infos = system.ls(folder, detail=True)
    # each file system raises exceptions of its own
    except Exception as error:
        yield unreadable_file(prefix.rstrip("/") or ".", str(error) or type(error).__name__)
        return
    info_of_name = {info["name"].rstrip("/").rpartition("/")[2]: info for info in infos}
    for name in sorted(info_of_name, key=lambda name: name.encode("utf-8", "surrogateescape")):
        info = info_of_name[name]
        # object stores may list the folder itself, as an object with an empty name
        if not name or name.startswith(".") or info["name"].rstrip("/") == folder.rstrip("/"):
            continue
        if info["type"] == "directory":
            yield from _walk(system, info["name"], f"{prefix}{name}/")
        else:
            yield InputFile(prefix + name, _remote_file(system, info))


def _remote_file(system: Any, info: dict[str, Any]) -> RemoteFile:
    changed = next((info[field] for field in VERSION_FIELDS if info.get(field)), "")
    version = None if info.get("size") is None else (int(info["size"]), str(changed))
    return RemoteFile(system.unstrip_protocol(info["name"]), version)


@contextmanager
def _explain_listing_errors(url: str) -> Iterator[None]:
    """Turn any exception that a file system raises while it lists `url` into a ConvlineError."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConvlineError(f"no such file or folder: {url}") from error
    # each file system raises exceptions of its own
    except Exception as error:
        raise ConvlineError(f"cannot list {url}: {str(error) or type(error).__name__}") from error
