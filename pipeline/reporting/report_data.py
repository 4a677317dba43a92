"""The data that the sections of a report share: run, network, logged points, predictions on test."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any

from PIL import Image

from convline.errors import ConvlineError
from convline.html import Html, card
from models.served_network import ServedNetwork
from pipeline.dataset import Dataset
from pipeline.network import Layer, layers, network_input_shape, predictor
from pipeline.reporting.plots import Plot
from pipeline.reporting.predictions import SplitPredictions
from pipeline.run import Run
from pipeline.tracking.points import Point, read_points
from serving.model import open_model


@dataclass
class ReportData:
    """`served` has the averaged weights of `step`. `pngs` collects what the report shows, as PNG files by name."""

    run: Run
    dataset: Dataset
    served: ServedNetwork
    step: int
    pngs: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def points(self) -> list[Point]:
        return list(read_points(self.run.metrics))

    @cached_property
    def summaries(self) -> list[Point]:
        return list(read_points(self.run.summaries))

    @cached_property
    def exported(self) -> dict[str, Any]:
        """The metadata of the run's model.onnx, where it holds the weights of this report; else empty."""
        try:
            metadata = open_model(self.run.model, "cpu").metadata
        except ConvlineError:  # told in the section about provenance
            return {}
        exported_from = metadata["run"]["id"], metadata["run"]["step"]
        return metadata if exported_from == (self.run.info["id"], self.step) else {}

    @cached_property
    def test_predictions(self) -> SplitPredictions:
        """Of the whole test split."""
        test = self.run.split(self.dataset, "test")
        device = next(self.served.parameters()).device
        return SplitPredictions.compute(predictor(self.served, device), test, self.run.classes)

    @cached_property
    def test_paths(self) -> list[str] | None:
        """Of the images in `test_predictions`; None where the dataset has no paths."""
        return self.dataset.paths(self.test_predictions.split)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return network_input_shape(self.run, self.served)

    @cached_property
    def layers(self) -> list[Layer]:
        return layers(self.served.network, self.image_shape)

    def plot_card(self, plot: Plot) -> Html:
        """A plot as part of the page; it is added to `pngs`."""
        self.pngs[plot.name] = plot.png()
        return card(plot.title, plot.svg(), plot.caption, plot.is_wide)

    def add_png(self, name: str, image: Image.Image) -> None:
        """Add an image to `pngs`, for images that the page shows as tiles."""
        buffer = BytesIO()
        image.save(buffer, "PNG")
        self.pngs[name] = buffer.getvalue()
