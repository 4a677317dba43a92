"""What MLflow's settings hold that nobody else may read, kept out of files, log lines and error messages."""

from __future__ import annotations

import html
import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from functools import lru_cache
from typing import TextIO, cast
from urllib.parse import unquote

HIDDEN = "***"
URIS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
    "DATABRICKS_PASSWORD",
    "DATABRICKS_CLIENT_SECRET",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
SHORT = 4  # characters; what is shorter is hidden only where it is a word
TOKEN = 16  # characters of a user's name from which it is taken for a token


def public(uri: str) -> str:
    """A URI without user, password, query and fragment, which may hold a token; of one that can be read in several
    ways no more than its scheme."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        scheme, rest = "", uri
    if rest.startswith("/"):  # a file's, which has no user
        return scheme + mark + rest.partition("?")[0]
    place, beyond = re.fullmatch(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]  # always matches
    if "@" in beyond:  # of the query, or of a password that has a ? or # in it
        return f"{scheme}{mark}…"
    return scheme + mark + place.rpartition("@")[2]


def scrubbed(text: str, *uris: str) -> str:
    """`text` without what is secret in the environment, and in these URIs."""
    for uri in filter(None, [*uris, *map(os.environ.get, URIS)]):
        text = text.replace(uri, public(uri))
    pattern = _pattern(frozenset(_secrets(uris)))
    return text if pattern is None else pattern.sub(HIDDEN, text)


def scrubbed_stream(stream: TextIO) -> TextIO:
    """`stream`, to which no secret of the environment can be written; itself where there is none."""
    return stream if _pattern(frozenset(_secrets(()))) is None else cast(TextIO, _Scrubbed(stream))


class _Scrubbed:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrubbed(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _secrets(uris: tuple[str, ...]) -> Iterator[str]:
    for uri in filter(None, [*uris, *map(os.environ.get, URIS)]):
        yield from _secrets_of(uri)
    yield from filter(None, map(os.environ.get, VARIABLES))
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if password:
        yield from _basic(f"{user}:{password}")


def _secrets_of(uri: str) -> Iterator[str]:
    """Rather too much than too little: each parser ends user and password at another character."""
    _, mark, rest = uri.partition("://")
    rest = rest if mark else uri
    place, _, query = rest.replace("#", "?").partition("?")
    yield from (part.rpartition("=")[2] for part in re.split("[?&;]", query))
    if rest.startswith("/"):
        return
    for end in [match.start() for match in re.finditer("@", place if "@" in place else rest)]:
        told = rest[:end]
        user, colon, password = told.partition(":")
        yield from (told, password, *_basic(told))
        yield from (piece for piece in re.split("[@:/?#]", password) if len(piece) > 1)
        if not colon or len(user) >= TOKEN:
            yield user


def _basic(user_and_password: str) -> Iterator[str]:
    """As HTTP sends it, which a server may repeat."""
    for told in (user_and_password, unquote(user_and_password)):
        yield b64encode(told.encode()).decode()


@lru_cache
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    whole = {form for secret in secrets for form in (secret, unquote(secret)) if form}
    longest_first = sorted(whole, key=lambda secret: (-len(secret), secret))
    return re.compile("|".join(map(_written, longest_first)), re.IGNORECASE) if whole else None


def _written(secret: str) -> str:
    """A pattern for the secret, whatever of it is percent-encoded, or escaped as in HTML, JSON or Python."""
    characters = []
    for character in secret:
        encoded = "".join(f"%{byte:02x}" for byte in character.encode())
        forms = {character, encoded, html.escape(character), json.dumps(character)[1:-1], repr(character)[1:-1]}
        characters.append(f"(?:{'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})")
    pattern = "".join(characters)
    return pattern if len(secret) >= SHORT else rf"(?<!\w){pattern}(?!\w)"
