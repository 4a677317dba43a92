"""`pipeline report`: one self-contained HTML page about a run, and its plots and images as PNG. Lists its sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from convline.files import atomic_write
from convline.html import HtmlContent, page
from models.served_network import Temperature
from pipeline.dataset import Dataset
from pipeline.device import choose_device
from pipeline.network import load_network
from pipeline.reporting import image_sections, sections
from pipeline.reporting.mistakes_table import write_mistakes
from pipeline.reporting.plots import save_pngs
from pipeline.reporting.report_data import ReportData
from pipeline.run import Run

SECTIONS: dict[str, Sequence[Callable[[ReportData], HtmlContent]]] = {
    "What was trained": (sections.training, image_sections.dataset_images),
    "The network": (sections.network,),
    "Learning curves": (sections.learning_curves,),
    "Right and wrong": (sections.accuracy,),
    "Images worth a look": (image_sections.notable_predictions,),
    "First layer": (image_sections.first_layer,),
    "Layers over training": (sections.layer_statistics,),
    "Augmentation": (image_sections.augmentation,),
    "Parity and provenance": (sections.provenance,),
}


def report(run: Run, dataset: Dataset) -> Path:
    """Write the run's report.html, its pictures as pictures/<name>.png, and mistakes.csv; returns the page.

    The averaged weights are evaluated on the whole test split, with the temperature of model.onnx if it has one. Raises
    ConvlineError if the run has no checkpoint yet.
    """
    served, step = load_network(run)
    data = ReportData(run, dataset, served, step)
    if calibration := data.exported.get("calibration"):
        served.temperature = Temperature(calibration["temperature"])
    served.to(choose_device("auto"))
    contents = [(title, [section(data) for section in parts]) for title, parts in SECTIONS.items()]
    text = page(f"{run.name}: an image classifier", sections.head(data), contents)
    save_pngs(run.pictures, data.pngs)
    write_mistakes(run, data.test_predictions, data.test_paths)
    with atomic_write(run.report_page, "w", encoding="utf-8") as file:
        file.write(text)
    return run.report_page
