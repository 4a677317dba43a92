"""Files of class names, as programs and people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convline.errors import ConvlineError
from serving.class_names import read_classes
from tests.serving.helpers import write

IMAGENET = {"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        pytest.param(b"cat\ndog\n", ("cat", "dog"), id="lines"),
        pytest.param(b'["cat", "dog"]', ("cat", "dog"), id="json"),
        pytest.param(b"\xef\xbb\xbf[unk]\r\ndog\r\n", ("[unk]", "dog"), id="windows"),
        pytest.param(b"cat\rdog\r", ("cat", "dog"), id="carriage-returns"),
        pytest.param(b"cat\ndog\n\n \n", ("cat", "dog"), id="blank-lines-at-the-end"),
        pytest.param("кот\r\nпёс\r\n".encode("utf-16"), ("кот", "пёс"), id="powershell"),
        pytest.param(b"\xfe\xff" + "кот\nпёс".encode("utf-16-be"), ("кот", "пёс"), id="utf-16-be"),
        pytest.param('["cat", "dog"]'.encode("utf-16"), ("cat", "dog"), id="json-in-utf-16"),
        pytest.param(b'{"1": "dog", "0": "cat"}', ("cat", "dog"), id="index-to-name"),
        pytest.param(b'{"dog": 1, "cat": 0}', ("cat", "dog"), id="name-to-index"),
        pytest.param(b'{"model_type": "vit", "id2label": {"0": "cat", "1": "dog"}}', ("cat", "dog"), id="id2label"),
        pytest.param(b"{0: 'cat, tabby',\n 1: 'dog'}", ("cat, tabby", "dog"), id="python"),
        pytest.param(json.dumps(IMAGENET).encode(), ("n01440764 tench", "n01443537 goldfish"), id="keras-imagenet"),
        pytest.param(
            b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
            ("n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus"),
            id="synsets",
        ),
    ],
)
def test_names_come_in_the_order_of_the_scores(tmp_path: Path, content: bytes, names: tuple[str, ...]) -> None:
    assert read_classes(write(tmp_path / "classes", content)) == names


def test_a_table_of_more_than_ten_is_ordered_by_number(tmp_path: Path) -> None:
    table = {str(index): f"class {index}" for index in sorted(range(12), key=str)}
    names = read_classes(write(tmp_path / "classes.json", json.dumps(table).encode()))
    assert names == tuple(f"class {index}" for index in range(12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"[1, 2]", "1 is not a name"),
        (b"[]", "contains no list"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\ndog\ncat\n", r"the class 'cat' twice \(as number 1 and 3\)"),
        (b"\xff\xfe", "it is empty"),
        (b"caf\xe9\ndog\n", "not UTF-8 text"),
        ("cat\ndog".encode("utf-16-le"), "NUL characters"),
        (b'{"1": "cat", "2": "dog"}', "does not map 0, 1, 2"),
        (b'{"0": "cat", "2": "dog"}', "does not map 0, 1, 2"),
        (b'{"cat": 0, "dog": 0}', "does not map 0, 1, 2"),
        (b'{"cat": "0.9", "dog": "0.1"}', "does not map 0, 1, 2"),
        (b'{"0": "cat", "1": null}', "None is not a name"),
        (b'["cat", "dog"', "begins as JSON, but is damaged"),
        (b'{"0": "cat"', "begins as JSON, but is damaged"),
        (b'["cat", ""]', "'' is not a name"),
        (b"[" * 100_000, "begins as JSON, but is damaged"),
    ],
)
def test_a_file_without_class_names_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "classes.txt", content)
    with pytest.raises(ConvlineError, match=message) as refused:
        read_classes(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConvlineError, match=r"missing\.txt does not hold class names.*: No such file") as refused:
        read_classes(tmp_path / "missing.txt")
    assert str(refused.value).count("missing.txt") == 1
