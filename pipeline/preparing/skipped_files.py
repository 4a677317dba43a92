"""Which files of an image folder are skipped: label tables, notes, code, what operating systems leave behind.

A file is skipped by its name alone. A web page that is named .jpg is a broken image: it is rejected, not skipped.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from convline.console import log

SKIPPED_NAMES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "folder.htt"),
    *("readme", "license", "licence", "copying", "copyright", "notice", "authors", "changelog", "citation", "version"),
    *("makefile", "dockerfile", "manifest", "checksums", "md5sums", "sha1sums", "sha256sums"),
}
SKIPPED_FOLDERS = {"@eadir", "__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found"}
SKIPPED_EXTENSIONS = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".geojson", ".xml", ".yaml", ".yml", ".toml", ".ini"),
    *(".cfg", ".conf", ".names", ".lst", ".cache", ".md", ".rst", ".html", ".htm", ".mht", ".css", ".js", ".log"),
    *(".bib", ".tex", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".eml"),
    *(".py", ".pyc", ".ipynb", ".sh", ".bat", ".ps1", ".m", ".r", ".c", ".cpp", ".h", ".java", ".exe", ".dll", ".so"),
    *(".npy", ".npz", ".mat", ".pkl", ".pickle", ".h5", ".hdf5", ".parquet", ".feather", ".arrow", ".tfrecord"),
    *(".db", ".sqlite", ".sqlite3", ".sql", ".lmdb", ".mdb", ".pt", ".pth", ".ckpt", ".onnx", ".pb", ".tflite"),
    *(".safetensors", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".torrent"),
    *(".md5", ".sha1", ".sha256", ".url", ".webloc", ".lnk", ".xmp", ".aae", ".ds_store", ".license"),
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".wmv", ".mpg", ".mpeg", ".mp3", ".wav", ".flac", ".ogg"),
}
MAX_LISTED = 3  # paths in a log line


def is_skipped(path: str) -> bool:
    """Whether the name of a file, or of a folder above it, says that it is not an image of the dataset."""
    name = PurePosixPath(path).name.casefold()
    return name in SKIPPED_NAMES or PurePosixPath(name).suffix in SKIPPED_EXTENSIONS or is_in_skipped_folder(path)


def is_in_skipped_folder(path: str) -> bool:
    return not SKIPPED_FOLDERS.isdisjoint(path.casefold().split("/")[:-1])


def log_skipped(paths: list[str], reason: str) -> None:
    """Log one line about files that are skipped; nothing where there are none."""
    if paths:
        count = f"{len(paths)} files" if len(paths) > 1 else "1 file"
        more = ", …" if len(paths) > MAX_LISTED else ""
        log(f"skipped {count} ({', '.join(map(escape_unprintable, paths[:MAX_LISTED]))}{more}): {reason}")


def escape_unprintable(path: str) -> str:
    """A path for a message: with escapes where it has unprintable characters."""
    return path if path.isprintable() else repr(path)[1:-1]
