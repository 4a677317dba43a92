"""`serving page`: a folder with a web page that classifies photographs in the visitor's browser, by onnxruntime-web.

The page and its scripts are in `web_page/`. The folder holds them, the model, and the part of the npm package
onnxruntime-web that they need; it works from any file server.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from convline.errors import ConvlineError, ModelError
from convline.files import new_folder
from convline.html import printable
from serving.model import OnnxModel, load_model
from serving.model_file import has_convline_metadata, parse_model, read_model

RUNTIME = "onnxruntime-web"
TESTED_RUNTIME = "1.30.0"  # older versions may lack these files, newer ones may rename them
# the smallest build: WebAssembly for CPUs with SIMD, without WebGPU; its loader is inside the script
SCRIPT, WASM = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"
DEFAULT_RUNTIME_FOLDER = Path("node_modules") / RUNTIME
LICENSE = "onnxruntime-license.txt"  # of web_page/, as the npm package only names its licence

MODEL = "model.onnx"
PAGE, STYLE = "index.html", "page.css"
SCRIPTS = ("page.js", "model.js", "metadata.js", "pixels.js", "sha256.js")


@dataclass(frozen=True)
class Runtime:
    """What is needed of onnxruntime-web: its version, and its files by the names that they get beside the page.

    The names have the version in them, so that a browser never combines cached files of two versions.
    """

    version: str
    script: bytes
    wasm: bytes
    license: bytes

    @property
    def names(self) -> dict[str, str]:
        """script as .js, because not every file server knows .mjs."""
        stem = f"{RUNTIME}-{self.version}"
        return {"script": f"{stem}.js", "wasm": f"{stem}.wasm", "license": f"{stem}.LICENSE.txt"}


def write_page(
    model_name: Path | str, output: Path, runtime_folder: Path = DEFAULT_RUNTIME_FOLDER, overwrite: bool = False
) -> Path:
    """Write the page for a file of `pipeline export --any-size` into the folder `output`, and return its index.html.

    The folder appears when it is complete. `overwrite` replaces an earlier page. Raises ModelError as `open_model`
    does, and for a file that takes images of one size only; ConvlineError if the folder holds anything else, or if
    onnxruntime-web is not installed.
    """
    output = output.resolve()  # a link to a folder stays, and "." gets its name
    _check_is_replaceable(output, overwrite)
    data = read_model(model_name)
    if not has_convline_metadata(parse_model(data, model_name)):
        raise ModelError(
            f"{model_name} was not exported by convline, so a page could not prove what it computes; "
            "`pipeline export RUN --any-size` makes a file for pages"
        )
    model = load_model(data, model_name, "cpu")
    if not model.any_size:
        raise ModelError(
            f"{model_name} takes images of {model.spec.height}x{model.spec.width} only, and browsers resize in another "
            "way than serving; `pipeline export RUN --any-size` makes a file that resizes them itself"
        )
    runtime = read_runtime(runtime_folder)
    with new_folder(output) as folder:
        for name, content in _page_files(model, data, runtime).items():
            (folder / name).write_bytes(content)
    return output / PAGE


def read_runtime(folder: Path) -> Runtime:
    """The files of an installed npm package onnxruntime-web. Raises ConvlineError if they are not there."""
    advice = f"install it by `npm install {RUNTIME}@{TESTED_RUNTIME}`, or name its folder by --{RUNTIME} FOLDER"
    missing = [name for name in ("package.json", SCRIPT, WASM) if not (folder / name).is_file()]
    if missing:
        raise ConvlineError(f"{folder} is not {RUNTIME}, or not all of it ({', '.join(missing)} missing); {advice}")
    try:
        package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        name, version, license = (str(package[key]) for key in ("name", "version", "license"))
    except (ValueError, KeyError, TypeError) as error:
        raise ConvlineError(f"{folder / 'package.json'} is damaged ({error}); {advice}") from error
    if name != RUNTIME or not re.fullmatch(r"[\w.+-]+", version):
        raise ConvlineError(f"{folder} holds the package {name} {version}, not {RUNTIME}; {advice}")
    return Runtime(version, (folder / SCRIPT).read_bytes(), (folder / WASM).read_bytes(), _license(folder, license))


def _license(folder: Path, stated: str) -> bytes:
    """The text of the package's licence. Raises ConvlineError for one that the package neither contains nor names."""
    for path in sorted(folder.glob("LICEN[SC]E*")):
        return path.read_bytes()
    if stated != "MIT":
        raise ConvlineError(f"{folder} states the licence {stated} without its text; add it there as LICENSE")
    return files("serving").joinpath("web_page", LICENSE).read_bytes()


def _check_is_replaceable(output: Path, overwrite: bool) -> None:
    """Raises ConvlineError if something is there, unless it may be overwritten and holds files of a page only."""
    if output.exists() and not output.is_dir():
        raise ConvlineError(f"{output} is a file; choose a folder")
    names = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if names and not overwrite:
        raise ConvlineError(
            f"{output} exists and is not empty; choose another folder, or replace a page by --overwrite"
        )
    ours = {PAGE, STYLE, MODEL, *SCRIPTS}
    others = [name for name in names if name not in ours and not name.startswith(f"{RUNTIME}-")]
    if others:
        listed = ", ".join(others[:3]) + (", …" if others[3:] else "")
        raise ConvlineError(
            f"{output} holds files that are not of a page ({listed}); --overwrite would remove them, so choose another "
            "folder or move them"
        )


def _page_files(model: OnnxModel, data: bytes, runtime: Runtime) -> dict[str, bytes]:
    """The content of each file of the page's folder."""
    web_page = files("serving").joinpath("web_page")
    template = Template(web_page.joinpath(PAGE).read_text(encoding="utf-8"))
    names = runtime.names
    values = {
        "title": f"Classify photographs: {model.metadata['dataset']['name']}",
        "origin": _origin(model.metadata),
        "model": MODEL,
        "model_sha256": model.sha256,
        "runtime": names["script"],
        "runtime_version": runtime.version,
        "runtime_license": names["license"],
        "wasm": names["wasm"],
        "wasm_sha256": hashlib.sha256(runtime.wasm).hexdigest(),
    }
    page = template.substitute({key: html.escape(printable(value)) for key, value in values.items()})
    style = files("convline").joinpath("page.css").read_bytes() + web_page.joinpath(STYLE).read_bytes()
    return {
        PAGE: page.encode(),
        STYLE: style,
        **{name: web_page.joinpath(name).read_bytes() for name in SCRIPTS},
        MODEL: data,
        names["script"]: runtime.script,
        names["wasm"]: runtime.wasm,
        names["license"]: runtime.license,
    }


def _origin(metadata: dict[str, Any]) -> str:
    """A sentence that says which model it is."""
    run, dataset = metadata["run"], metadata["dataset"]["name"]
    return f"The model is of the run {run.get('name') or run['id']}, trained on {dataset}, step {run['step']}."
