"""`Footer`, the last line of the journal of a finished job, which says to what output the journal belongs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convline.errors import ConvlineError
from convline.files import sha256
from serving.journal_format import read_footer
from serving.output_files import finished_journal_path, rejects_path
from serving.sort_into import SortedFolder


@dataclass(frozen=True)
class Footer:
    """The SHA-256 of the table and of its rejects, and the folder of `--sort-into` if there was one."""

    table: str
    rejects: str
    sorted_folder: SortedFolder | None = None

    @classmethod
    def of_output(cls, output: Path, sorted_folder: SortedFolder | None) -> Footer:
        return cls(sha256(output), sha256(rejects_path(output)), sorted_folder)

    @classmethod
    def read(cls, output: Path) -> Footer | None:
        """The footer of `<output>.journal`; None if there is none. Raises ConvlineError for a damaged one."""
        path = finished_journal_path(output)
        try:
            footer = read_footer(path)
            if footer is None:
                return None
            folder = footer["sorted_folder"]
            return cls(footer["table"], footer["rejects"], SortedFolder(**folder) if folder else None)
        except (ValueError, KeyError, TypeError) as error:
            raise ConvlineError(f"{path} is damaged; start from the beginning with --overwrite") from error

    def describes(self, output: Path) -> bool:
        """Whether the table and the rejects are those that the job wrote."""
        if not (output.exists() and rejects_path(output).exists()):
            return False
        return (sha256(output), sha256(rejects_path(output))) == (self.table, self.rejects)
