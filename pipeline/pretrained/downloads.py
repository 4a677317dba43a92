"""Finds files of weights in the caches of torch.hub and huggingface_hub, and downloads those that are missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError

from convline.console import log
from convline.errors import ConvlineError

# the end of the names under which torch publishes files: the beginning of their SHA-256
HASH = re.compile(r"-([a-f0-9]{8,})\.")


def hub_path(url: str) -> Path:
    """Where torch.hub keeps the file of a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def file_of_url(url: str, where: str, remedy: str) -> Path:
    """The file of a URL, downloaded unless torch.hub has it. `where` begins an error's message, `remedy` ends it.

    Raises ConvlineError where it cannot be downloaded.
    """
    path = hub_path(url)
    if path.exists():
        return path
    log(f"downloading {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = HASH.search(path.name)
    try:
        torch.hub.download_url_to_file(url, str(path), digest.group(1) if digest else None, progress=False)
    # what urllib and http raise for networks that are down, and torch for a file with another SHA-256
    except Exception as error:
        raise ConvlineError(
            f"{where}: {path} is missing, and {url} cannot be downloaded ({_reason(error)}); bring that file "
            f"there, or {remedy}"
        ) from error
    return path


def file_of_repository(repository: str, names: Sequence[str], where: str, remedy: str) -> Path:
    """The first file of these names in a repository of the Hugging Face hub, downloaded unless it is in the cache,
    which is looked into without a connection. `where` begins an error's message, `remedy` ends it.

    Raises ConvlineError where none can be downloaded.
    """
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    url = hf_hub_url(repository, names[0])
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    log(f"downloading {url}")
    try:
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except RemoteEntryNotFoundError:
                continue
    # what huggingface_hub, its HTTP client and the system raise
    except Exception as error:
        raise ConvlineError(
            f"{where}: {names[0]} is not in {folder}/snapshots, and {url} cannot be downloaded ({_reason(error)}); "
            f"{remedy}"
        ) from error
    raise ConvlineError(f"{where}: {repository} on {constants.ENDPOINT} has no file {' or '.join(names)}; {remedy}")


def _reason(error: Exception) -> str:
    first_sentence = re.split(r"\n|\. ", str(error).strip())[0]
    return f"{type(error).__name__}: {first_sentence}" if first_sentence else type(error).__name__
