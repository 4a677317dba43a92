"""How MLflow lists the runs at first: with the figures that they are compared by as columns, the best one first."""

from __future__ import annotations

import json
import zlib
from base64 import b64encode

KEY = "convline"  # of the view, in the address that `make ui` names
COLUMNS = (
    "attributes.`Dataset`",
    "attributes.`Duration`",
    "params.`model.name`",
    "params.`train.steps`",
    "metrics.`precision_at_1`",
    "metrics.`train_precision_at_1`",
    "metrics.`training_seconds`",
    "metrics.`images_per_second`",
)


def experiment_tags() -> dict[str, str]:
    """Tags of an experiment by which MLflow's pages know that it trains models, and find the view `KEY` (as they keep
    the ones that users share: compressed JSON)."""
    view = {"selectedColumns": COLUMNS, "orderByKey": "metrics.`precision_at_1`", "orderByAsc": False}
    packed = b64encode(zlib.compress(json.dumps(view).encode())).decode()
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{KEY}": f"deflate;{packed}"}
