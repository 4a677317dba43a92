"""Fetches official archives: mirrors, checksums, whole files or none."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from convline.console import log, progress
from convline.errors import ConvlineError
from pipeline.preparing.official_datasets import OfficialDataset

TIMEOUT = 30  # seconds without a byte


def download(dataset: OfficialDataset, data_dir: Path, mirrors: Sequence[str] = ()) -> list[Path]:
    """The dataset's archives under `data_dir`/archives, fetched where they are not there yet.

    `mirrors` (http, https or file URLs) are tried before the official ones.
    Raises ConvlineError when no mirror gives the file with its checksum; nothing partial stays.
    """
    folder = data_dir / "archives" / dataset.name
    return [
        _fetch(name, checksum, folder, [*mirrors, *dataset.mirrors], dataset.name)
        for name, checksum in dataset.files.items()
    ]


def _fetch(name: str, checksum: str, folder: Path, mirrors: Sequence[str], dataset: str) -> Path:
    import pooch
    import requests
    import urllib3

    path = folder / name
    if path.exists() and pooch.file_hash(str(path), checksum.split(":")[0]) == checksum.split(":")[1]:
        return path
    pooch.get_logger().setLevel("ERROR")
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        log(f"downloading {url}")
        try:
            # pooch fetches beside, checks the checksum, then renames
            pooch.retrieve(url, checksum, name, folder, downloader=_copy if url.startswith("file:") else _http)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            failures.append(f"{url}: {_why(error)}")
            log(f"  {_why(error)}")
        else:
            return path
    raise ConvlineError(
        f"could not download {name} of {dataset} from any mirror: {'; '.join(failures)}. "
        f"Check the network, give another --mirror URL, or put the file into {folder}"
    )


def _http(url: str, output: Any, _: Any) -> None:
    """Stream to a file with a progress bar; a body shorter than announced raises."""
    import requests

    with requests.get(url, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        total = int(response.headers.get("content-length", 0)) or None
        with open(output, "wb") as file, progress(Path(urlsplit(url).path).name, total, "bytes") as bar:
            # raw: .gz files are the archive itself, not an encoding to undo
            while chunk := response.raw.read(1 << 18):
                file.write(chunk)
                bar.advance(bar.task_ids[0], len(chunk))


def _copy(url: str, output: Any, _: Any) -> None:
    shutil.copyfile(unquote(urlsplit(url).path), output)


def _why(error: Exception) -> str:
    """One clause for a failed transfer."""
    import requests
    import urllib3

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT} s"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the download was cut off (truncated)"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    message = str(error)
    return "its checksum is wrong (damaged, or another file)" if "hash" in message else message
