"""Pages as Chromium draws them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


def screenshot(page: Path, width: int, height: int) -> NDArray[np.uint8]:
    """The pixels of a page, uint8 [height, width, 3]. Skips the test where there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium")
    picture = page.with_suffix(".screenshot.png")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}", "--hide-scrollbars")
    command = [browser, *options, f"--user-data-dir={page.parent}/profile", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))
