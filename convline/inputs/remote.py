"""Files behind URLs (s3://…, gs://…, memory://…), through fsspec and the package that it wants for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from convline.errors import ConvlineError, ImageError
from convline.inputs.archives import is_archive, read_archive, refuse_unread
from convline.inputs.input_file import InputFile, Stamp, check_size, unreadable


@dataclass(frozen=True)
class Remote:
    """A file behind a URL; `info` is its stamp where the listing told it."""

    url: str
    info: Stamp | None = None

    def read(self) -> bytes:
        try:
            system, path = open_system(self.url)
            size = self.info[0] if self.info is not None else system.size(path)
            if size is not None:
                check_size(size)
            return system.cat_file(path)
        except ImageError:
            raise
        # every file system has exceptions of its own
        except Exception as error:
            raise ImageError("unreadable", str(error) or type(error).__name__) from error

    def stamp(self) -> Stamp | None:
        return self.info


def open_system(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path on it. Raises ConvlineError where what it needs is missing."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ConvlineError(f"{url} needs fsspec: pip install 'convline[remote]'") from error
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConvlineError(f"cannot open {url}: {error}") from error


def open_url(url: str) -> IO[bytes]:
    """The file behind a URL, read where it is asked for. Raises ConvlineError as `open_system` does."""
    system, path = open_system(url)
    file: IO[bytes] = system.open(path, "rb")
    return file


def find_remote(url: str, is_prefixed: bool) -> Iterator[InputFile]:
    """The files of a URL: of one file, a folder, a glob or an archive. Raises ConvlineError where there is nothing."""
    system, path = open_system(url)
    with _asking(url):
        matches = _glob(system, path) if "*" in path or "?" in path else [path]
        infos = [system.info(match) for match in matches]
    if not infos:
        raise ConvlineError(f"nothing matches {url}; is the pattern right?")
    if matches == [path] and infos[0]["type"] != "directory":
        refuse_unread(url)
    names = [url] if matches == [path] else [system.unstrip_protocol(match) for match in matches]
    return _find(system, list(zip(names, infos, strict=True)), is_prefixed or names != [url])


def _glob(system: Any, pattern: str) -> list[str]:
    return sorted(system.glob(pattern), key=lambda match: match.encode("utf-8", "surrogateescape").split(b"/"))


def _find(system: Any, roots: list[tuple[str, dict[str, Any]]], is_prefixed: bool) -> Iterator[InputFile]:
    for name, info in roots:
        prefix = name.rstrip("/") + "/" if is_prefixed else ""
        if info["type"] == "directory":
            yield from _walk(system, info["name"], prefix)
        elif is_archive(name):
            yield from read_archive(name, prefix, open_url)
        else:
            yield InputFile(name if is_prefixed else name.rpartition("/")[2], _remote(system, info))


def _walk(system: Any, folder: str, prefix: str) -> Iterator[InputFile]:
    """Depth first, each folder's names sorted by their bytes."""
    try:
        infos = system.ls(folder, detail=True)
    # every file system has exceptions of its own
    except Exception as error:
        yield unreadable(prefix.rstrip("/") or ".", str(error) or type(error).__name__)
        return
    named = {info["name"].rstrip("/").rpartition("/")[2]: info for info in infos}
    for name in sorted(named, key=lambda name: name.encode("utf-8", "surrogateescape")):
        # an object store may list the folder itself, as an object without a name
        if not name or name.startswith(".") or named[name]["name"].rstrip("/") == folder.rstrip("/"):
            continue
        if named[name]["type"] == "directory":
            yield from _walk(system, named[name]["name"], f"{prefix}{name}/")
        else:
            yield InputFile(prefix + name, _remote(system, named[name]))


def _remote(system: Any, info: dict[str, Any]) -> Remote:
    told = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    stamp = None if info.get("size") is None else (int(info["size"]), str(told))
    return Remote(system.unstrip_protocol(info["name"]), stamp)


@contextmanager
def _asking(url: str) -> Iterator[None]:
    """Whatever a file system raises while it is asked what there is becomes one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConvlineError(f"no such file or folder: {url}") from error
    # every file system has exceptions of its own
    except Exception as error:
        raise ConvlineError(f"cannot list {url}: {str(error) or type(error).__name__}") from error
