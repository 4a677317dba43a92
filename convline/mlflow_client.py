"""MLflow's registry as a place where models are: `models:/NAME@champion`, `models:/NAME/3`."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convline.errors import ConvlineError, ModelError
from convline.secrets import public, scrubbed

SCHEME = "models:/"

# a server that is down or frozen must fail a request soon, not after MLflow's own twelve minutes
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for a store of another kind."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()


@contextmanager
def asking(uri: str, failed: str, error: type[ConvlineError] = ConvlineError) -> Iterator[None]:
    """Turn whatever MLflow's client meets at `uri` into one `error`: "MLflow at … <failed>: …".

    It raises its own, requests', urllib3's and SQLAlchemy's exceptions alike.
    """
    try:
        yield
    except ConvlineError:
        raise
    except Exception as problem:
        met = scrubbed(str(problem), uri).strip().partition("\n")[0]
        raise error(f"MLflow at {public(uri)} {failed}: {met}") from problem


def prepare_mlflow(what: str) -> None:
    """Import MLflow, told to be quick and quiet. Raises ConvlineError where it is missing: `what` needs it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise ConvlineError(f"{what} needs MLflow: pip install 'convline[mlflow]'") from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def read_registered(name: str) -> bytes:
    """The ONNX file of a registered version or alias. Raises ModelError where there is none."""
    if not re.fullmatch(r"models:/[^/@]+(@[^/@]+|/\d+)", name):
        raise ModelError(f"{name} names no registered model; write it as models:/NAME@champion or models:/NAME/3")
    prepare_mlflow(f"the model {name}")
    uri = tracking_uri()
    store = database_file(uri)
    if store is not None and not store.exists():
        raise ModelError(f"no MLflow store at {store}, where {name} would be; set MLFLOW_TRACKING_URI")
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        with asking(uri, f"did not give {name}", ModelError):
            there = Path(download_artifacts(artifact_uri=name, dst_path=folder, tracking_uri=uri, registry_uri=uri))
        files = sorted(there.rglob("*.onnx"))
        if len(files) != 1:
            raise ModelError(f"{name} holds {len(files)} ONNX files, not one; `pipeline export --register` makes such")
        return files[0].read_bytes()
