"""CSV, JSON Lines and Parquet hold the same rows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from convline.errors import ConvlineError
from serving.records import Prediction
from serving.tables import ROW_GROUP, Format, open_table, path_in_table, read_rows, table_format
from tests.serving.helpers import csv_rows

ROWS = [
    Prediction("a.png", ("cat", "dog"), (0.9987123, 0.0012876)),
    Prediction('odd "name",\r\n.png', ("dog", "cat"), (0.5, 0.5)),
    Prediction("日本.png", ("cat", "dog"), (1.0, 1e-30)),
    Prediction(b"\xff.png".decode("utf-8", "surrogateescape"), ("T-shirt/top", "dog"), (0.75, 0.25)),
]


def written(path: Path, rows: list[Prediction], top_k: int = 2) -> Path:
    with path.open("wb") as file, open_table(file, table_format(path), top_k) as table:
        for row in rows:
            table.write(row)
    return path


def test_parquet_has_a_typed_column_for_each_of_csv(tmp_path: Path) -> None:
    parquet = pyarrow.parquet.read_table(written(tmp_path / "x.parquet", ROWS))
    assert [(field.name, str(field.type)) for field in parquet.schema] == [
        ("path", "string"),
        ("label", "string"),
        ("probability", "float"),
        ("label_2", "string"),
        ("probability_2", "float"),
    ]
    rows = csv_rows(written(tmp_path / "x.csv", ROWS))
    for mine, theirs in zip(parquet.to_pylist()[:3], rows, strict=False):
        assert mine["path"] == theirs["path"] and mine["label"] == theirs["label"]
        assert str(mine["probability"])[:8] == theirs["probability"][:8]
    assert parquet.column("path").to_pylist()[3] == "\\xff.png"  # what a string cannot hold


def test_json_lines_hold_names_that_are_not_utf_8(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in written(tmp_path / "x.jsonl", ROWS).read_text("ascii").splitlines()]
    assert [line["path"] for line in lines] == [row.path for row in ROWS]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_paths_and_labels_are_read_back(tmp_path: Path, ending: str) -> None:
    table = written(tmp_path / f"x.{ending}", ROWS)
    read = list(read_rows(table))
    assert [(row.path, *row.labels) for row in read] == [
        (path_in_table(row.path, table), row.labels[0]) for row in ROWS
    ]
    assert [row.probabilities[0] for row in read] == pytest.approx([row.probabilities[0] for row in ROWS], rel=1e-6)
    assert list(read_rows(written(tmp_path / f"none.{ending}", []))) == []


def test_cells_that_are_formulas_are_made_safe_and_read_back(tmp_path: Path) -> None:
    names = ["=1", "+1", "-1", "@x", "\t=x", "\r=x", "\n=x", "'=x", "'quoted'", " =x", "a=b", "''+", "", '="a",b']
    rows = [Prediction(name, (name, "=second"), (0.5, 0.25)) for name in names]
    with (tmp_path / "x.csv").open("wb") as file, open_table(file, "csv", 2, csv_safe=True) as table:
        for row in rows:
            table.write(row)
    cells = csv_rows(tmp_path / "x.csv")
    assert not [
        cell for row in cells for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    ]
    assert [row["path"] for row in cells if row["path"] in names] == ["'quoted'", " =x", "a=b", ""]
    assert all(row["label_2"] == "'=second" for row in cells)
    read = list(read_rows(tmp_path / "x.csv", csv_safe=True))
    assert [(row.path, *row.labels) for row in read] == [
        (path_in_table(name, tmp_path / "x.csv", csv_safe=True), name) for name in names
    ]
    assert len({row.path for row in read}) == len(names)


def test_a_large_parquet_file_is_written_in_groups(tmp_path: Path) -> None:
    rows = [Prediction(f"{number}.png", ("cat",), (0.5,)) for number in range(ROW_GROUP + 10)]
    with pyarrow.parquet.ParquetFile(written(tmp_path / "x.parquet", rows, top_k=1)) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [ROW_GROUP, 10]
        assert file.read().column("path").to_pylist() == [row.path for row in rows]


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_flush_writes_all_rows_so_far(format: Format) -> None:
    file = io.BytesIO()
    with open_table(file, format, 2) as table:
        table.write(ROWS[0])
        table.flush()
        assert b"a.png" in file.getvalue()
    file.write(b"still open")


def test_an_ending_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConvlineError, match=r"x\.txt; end its name in \.csv or \.jsonl or \.parquet"):
        table_format("x.txt")


def test_parquet_without_pyarrow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    with pytest.raises(ConvlineError, match=r"pip install 'convline\[parquet\]'"):
        table_format("x.parquet")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_decisions_are_read_back_escaped_or_not(tmp_path: Path, ending: str) -> None:
    rows = [
        Prediction("a", ("=cat", "dog"), (0.9, 0.1), "=cat"),
        Prediction("b", ("dog", "=cat"), (0.5, 0.5), "unsure"),
    ]
    path, is_safe = tmp_path / f"x.{ending}", ending == "csv"
    with path.open("wb") as file, open_table(file, table_format(path), 2, is_safe, optional=["decision"]) as table:
        for row in rows:
            table.write(row)
    assert [(row.labels[0], row.decision) for row in read_rows(path, is_safe)] == [("=cat", "=cat"), ("dog", "unsure")]
    if is_safe:
        assert path.read_text().splitlines()[1] == "a,'=cat,0.9,'=cat,dog,0.1"
