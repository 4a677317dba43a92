"""`pipeline report`: one self-contained page on a run, and the same pictures as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.dataset import Dataset
from pipeline.engine import exhibits, showcase
from pipeline.engine.network import choose_device, load_served
from pipeline.engine.pictures import save
from pipeline.engine.run import Run
from pipeline.engine.subject import Subject
from serving.files import atomic_write
from serving.page import Content, page

SECTIONS: dict[str, Sequence[Callable[[Subject], Content]]] = {
    "What was trained": (exhibits.trained, showcase.dataset),
    "The network": (exhibits.network,),
    "Learning curves": (exhibits.learning,),
    "Right and wrong": (exhibits.judged,),
    "Images worth a look": (showcase.judged,),
    "First layer": (showcase.first_layer,),
    "Layers over training": (exhibits.insides,),
    "Distortions": (showcase.distortions,),
    "Parity and provenance": (exhibits.provenance,),
}


def report(run: Run, dataset: Dataset) -> Path:
    """Write the run's report.html, and its pictures as pictures/<name>.png; returns the page.

    The averaged weights are evaluated on the whole test split. Raises ConvlineError where the run has no checkpoint
    yet.
    """
    served, step = load_served(run)
    subject = Subject(run, dataset, served.to(choose_device("auto")), step)
    sections = [(title, [show(subject) for show in shown]) for title, shown in SECTIONS.items()]
    text = page(f"{run.name}: an image classifier", exhibits.head(subject), sections)
    save(run.pictures, subject.pictures)
    with atomic_write(run.page, "w", encoding="utf-8") as file:
        file.write(text)
    return run.page
