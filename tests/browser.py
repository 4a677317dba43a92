"""Pages as Chromium draws them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


def chromium() -> str:
    """The path of the system's Chromium. Skips the test where there is none."""
    for path in filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))):
        # under Ubuntu the last one may be a script that only says what to install
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip("Chromium is not installed")


def screenshot(page: Path, width: int, height: int) -> NDArray[np.uint8]:
    """The pixels of a page, uint8 [height, width, 3]. Skips the test where there is no Chromium."""
    picture = page.with_suffix(".screenshot.png")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}", "--hide-scrollbars")
    command = [chromium(), *options, f"--user-data-dir={page.parent}/profile", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))
