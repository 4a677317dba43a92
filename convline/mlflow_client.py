"""The MLflow client: tracking URI, timeouts, errors, and models from the registry (`models:/NAME@champion`)."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convline.errors import ConvlineError, ModelError
from convline.secrets import redacted, without_credentials

SCHEME = "models:/"

# requests to a server that does not answer fail after 10 s; by MLflow's defaults it would take twelve minutes
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri() -> str:
    """The value of MLFLOW_TRACKING_URI, by default the SQLite file mlflow.db in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for a store of another kind."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()


@contextmanager
def explain_mlflow_errors(uri: str, failed: str, error: type[ConvlineError] = ConvlineError) -> Iterator[None]:
    """Turn any exception of MLflow's client into an `error` with the message "MLflow at <uri> <failed>: <cause>".

    The client raises its own exceptions and those of requests, urllib3 and SQLAlchemy.
    """
    try:
        yield
    except ConvlineError:
        raise
    except Exception as cause:
        first_line = redacted(str(cause), uri).strip().partition("\n")[0]
        raise error(f"MLflow at {without_credentials(uri)} {failed}: {first_line}") from cause


def import_mlflow(needed_by: str) -> None:
    """Import MLflow with short timeouts and few log messages.

    Raises ConvlineError if it is not installed; the message says that `needed_by` needs it.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise ConvlineError(f"{needed_by} needs MLflow: pip install 'convline[mlflow]'") from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def read_registered(name: str) -> bytes:
    """The bytes of the ONNX file of a registered model version or alias. Raises ModelError if there is none."""
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", name)
    if parts is None:
        raise ModelError(
            f"{name} is not the name of a registered model; write it as models:/NAME@champion or models:/NAME/3"
        )
    import_mlflow(f"the model {name}")
    uri = tracking_uri()
    database = database_file(uri)
    if database is not None and not database.exists():
        raise ModelError(f"no MLflow store at {database}, so {name} cannot be found; set MLFLOW_TRACKING_URI")
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        with explain_mlflow_errors(uri, f"did not give {name}", ModelError):
            location = _artifact_location(parts[1], parts[2], parts[3], uri)
            artifacts = Path(download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=uri))
        files = sorted(artifacts.rglob("*.onnx"))
        if len(files) != 1:
            raise ModelError(
                f"{name} holds {len(files)} ONNX files instead of one; register models by `pipeline export --register`"
            )
        return files[0].read_bytes()


def _artifact_location(name: str, alias: str | None, version: str | None, uri: str) -> str:
    """Where the artifacts of a registered model are, by its alias or else its version.

    MLflow resolves names in the registry of MLFLOW_REGISTRY_URI, whichever it is asked for; models are registered at
    the tracking server.
    """
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    if alias is not None:
        version = client.get_model_version_by_alias(name, alias).version
    location: str = client.get_model_version_download_uri(name, str(version))
    if location.startswith(SCHEME):  # of a logged model, by its id
        location = client.get_logged_model(location.removeprefix(SCHEME)).artifact_location
    return location
