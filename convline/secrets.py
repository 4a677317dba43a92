"""Redacts secrets: passwords and tokens of MLflow's settings never reach files, log lines or error messages."""

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

REDACTED = "***"
URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
    "DATABRICKS_PASSWORD",
    "DATABRICKS_CLIENT_SECRET",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
SHORT_SECRET = 4  # characters; a shorter secret is redacted only where it is a whole word
MIN_TOKEN = 16  # characters; a user name at least this long is treated as a token


def without_credentials(uri: str) -> str:
    """A URI without user, password, query and fragment, any of which may hold a secret.

    Where it is unclear which part is the password, only the scheme remains.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "", uri
    if rest.startswith("/"):  # a file, which has no user
        return scheme + separator + rest.partition("?")[0]
    authority_and_path, query = re.fullmatch(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]  # always matches
    if "@" in query:  # it may belong to the query, or end a password that contains ? or #
        return f"{scheme}{separator}…"
    return scheme + separator + authority_and_path.rpartition("@")[2]


def redacted(text: str, *uris: str) -> str:
    """`text` without the secrets that are in the environment or in `uris`."""
    for uri in filter(None, [*uris, *map(os.environ.get, URI_VARIABLES)]):
        text = text.replace(uri, without_credentials(uri))
    pattern = _pattern(frozenset(_secrets(uris)))
    return text if pattern is None else pattern.sub(REDACTED, text)


def redacting_stream(stream: TextIO) -> TextIO:
    """A stream that redacts what it writes to `stream`; `stream` itself if the environment holds no secrets."""
    return stream if _pattern(frozenset(_secrets(()))) is None else cast(TextIO, _RedactingStream(stream))


class _RedactingStream:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _secrets(uris: tuple[str, ...]) -> Iterator[str]:
    for uri in filter(None, [*uris, *map(os.environ.get, URI_VARIABLES)]):
        yield from _secrets_in_uri(uri)
    yield from filter(None, map(os.environ.get, SECRET_VARIABLES))
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if password:
        yield from _basic_authentication(f"{user}:{password}")


def _secrets_in_uri(uri: str) -> Iterator[str]:
    """Every part that may be a secret.

    URI parsers disagree on the character that ends a user or a password, so each possible reading counts.
    """
    _, separator, rest = uri.partition("://")
    rest = rest if separator else uri
    authority_and_path, _, query = rest.replace("#", "?").partition("?")
    yield from (part.rpartition("=")[2] for part in re.split("[?&;]", query))
    if rest.startswith("/"):
        return
    searched = authority_and_path if "@" in authority_and_path else rest
    for end in [match.start() for match in re.finditer("@", searched)]:
        credentials = rest[:end]
        user, colon, password = credentials.partition(":")
        yield from (credentials, password, *_basic_authentication(credentials))
        yield from (piece for piece in re.split("[@:/?#]", password) if len(piece) > 1)
        if not colon or len(user) >= MIN_TOKEN:
            yield user


def _basic_authentication(credentials: str) -> Iterator[str]:
    """The base64 forms that HTTP sends; a server may repeat them in an error message."""
    for form in (credentials, unquote(credentials)):
        yield b64encode(form.encode()).decode()


@lru_cache
def _pattern(secrets: frozenset[str]) -> re.Pattern[str] | None:
    forms = {form for secret in secrets for form in (secret, unquote(secret)) if form}
    longest_first = sorted(forms, key=lambda secret: (-len(secret), secret))
    return re.compile("|".join(map(_secret_pattern, longest_first)), re.IGNORECASE) if forms else None


def _secret_pattern(secret: str) -> str:
    """Matches the secret even if some of its characters are percent-encoded, or escaped as in HTML, JSON or Python."""
    characters = []
    for character in secret:
        encoded = "".join(f"%{byte:02x}" for byte in character.encode())
        forms = {character, encoded, html.escape(character), json.dumps(character)[1:-1], repr(character)[1:-1]}
        characters.append(f"(?:{'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})")
    pattern = "".join(characters)
    return pattern if len(secret) >= SHORT_SECRET else rf"(?<!\w){pattern}(?!\w)"
