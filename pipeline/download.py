"""Downloads official archives from mirrors, with checksums and a progress bar; never leaves partial files."""

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

TIMEOUT = 30  # seconds in which no data arrives


def download(dataset: OfficialDataset, data_dir: Path, mirrors: Sequence[str] = ()) -> list[Path]:
    """The paths of the dataset's archives under `data_dir`/archives; missing and damaged ones are downloaded.

    `mirrors` (http, https or file URLs) are tried before the official ones.
    Raises ConvlineError when no mirror provides a file with the right checksum.
    """
    folder = data_dir / "archives" / dataset.name
    return [
        _download_file(name, checksum, folder, [*mirrors, *dataset.mirrors], dataset.name)
        for name, checksum in dataset.files.items()
    ]


def _download_file(name: str, checksum: str, folder: Path, mirrors: Sequence[str], dataset: str) -> Path:
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
            # pooch downloads to a temporary file, verifies the checksum, then renames it
            downloader = _copy_file if url.startswith("file:") else _download_http
            pooch.retrieve(url, checksum, name, folder, downloader=downloader)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            failures.append(f"{url}: {_reason(error)}")
            log(f"  {_reason(error)}")
        else:
            return path
    raise ConvlineError(
        f"could not download {name} of {dataset} from any mirror: {'; '.join(failures)}. "
        f"Check the network, give another --mirror URL, or put the file into {folder}"
    )


def _download_http(url: str, output: Any, _: Any) -> None:
    """Stream to a file, with a progress bar. Raises an exception for a body shorter than its Content-Length."""
    import requests

    with requests.get(url, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        total = int(response.headers.get("content-length", 0)) or None
        with open(output, "wb") as file, progress(Path(urlsplit(url).path).name, total, "bytes") as bar:
            # raw: some servers call a .gz file gzip-encoded, and requests would decompress it
            while chunk := response.raw.read(1 << 18):
                file.write(chunk)
                bar.advance(bar.task_ids[0], len(chunk))


def _copy_file(url: str, output: Any, _: Any) -> None:
    shutil.copyfile(unquote(urlsplit(url).path), output)


def _reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
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
        return "no such file"
    message = str(error)
    return "its checksum is wrong (damaged, or another file)" if "hash" in message else message
