"""Files that lie beside the images of a dataset and are none: tables of labels, notes, what an operating system leaves.

They are known by their names. A file that is called .jpg and holds a web page is a broken image, and is rejected.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from convline.console import log

NAMES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "folder.htt"),
    *("readme", "license", "licence", "copying", "copyright", "notice", "authors", "changelog", "citation", "version"),
    *("makefile", "dockerfile", "manifest", "checksums", "md5sums", "sha1sums", "sha256sums"),
}
FOLDERS = {"@eadir", "__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found"}
ENDINGS = {
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
NAMED = 3  # of many


def is_stray(path: str) -> bool:
    """Whether a file is certainly no image of the dataset, by its name or a folder's."""
    name = PurePosixPath(path).name.casefold()
    return name in NAMES or PurePosixPath(name).suffix in ENDINGS or is_in_stray_folder(path)


def is_in_stray_folder(path: str) -> bool:
    return not FOLDERS.isdisjoint(path.casefold().split("/")[:-1])


def tell_unused(paths: list[str], why: str) -> None:
    """One line on files that are not used, if there are some."""
    if paths:
        files = f"{len(paths)} files" if len(paths) > 1 else "1 file"
        more = ", …" if len(paths) > NAMED else ""
        log(f"not used, {why}: {files} ({', '.join(map(printable, paths[:NAMED]))}{more})")


def printable(path: str) -> str:
    """A path as a message can show it."""
    return path if path.isprintable() else repr(path)[1:-1]
