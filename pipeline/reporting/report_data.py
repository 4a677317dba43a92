"""A run with what a report needs of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO

from PIL import Image

from convline.html import Html, card
from models.served_network import ServedNetwork
from pipeline.dataset import Dataset
from pipeline.network import Layer, layers, network_input_shape, predictor
from pipeline.reporting.outcomes import Outcomes
from pipeline.reporting.plots import Picture
from pipeline.run import Run
from pipeline.tracking.points import Point, read_points


@dataclass
class ReportData:
    """`served` has the averaged weights of `step`. `pictures` collects what was shown, as PNG by name."""

    run: Run
    dataset: Dataset
    served: ServedNetwork
    step: int
    pictures: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def points(self) -> list[Point]:
        return list(read_points(self.run.metrics))

    @cached_property
    def summaries(self) -> list[Point]:
        return list(read_points(self.run.summaries))

    @cached_property
    def outcomes(self) -> Outcomes:
        """Of the whole test split."""
        test = self.run.split(self.dataset, "test")
        device = next(self.served.parameters()).device
        return Outcomes.of(predictor(self.served, device), test, self.run.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return network_input_shape(self.run, self.served)

    @cached_property
    def layers(self) -> list[Layer]:
        return layers(self.served.network, self.image_shape)

    def card(self, picture: Picture) -> Html:
        """A picture to be shown, and kept."""
        self.pictures[picture.name] = picture.png()
        return card(picture.title, picture.svg(), picture.caption, picture.wide)

    def keep(self, name: str, image: Image.Image) -> None:
        """An image of what is shown as tiles."""
        buffer = BytesIO()
        image.save(buffer, "PNG")
        self.pictures[name] = buffer.getvalue()
