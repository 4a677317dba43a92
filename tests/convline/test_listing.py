"""Folders, single files and archives become one stream of files in one fixed order."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from io import BufferedReader, BytesIO, TextIOWrapper
from pathlib import Path

import fsspec
import pytest

from convline.errors import ConvlineError, ImageError
from convline.inputs.archives import read_archive
from convline.inputs.input_file import InputFile, OnDisk, Rejected
from convline.inputs.listing import find, folders, walk
from tests.serving.helpers import write

# in the documented order: depth first, each folder's names sorted by their bytes
TREE = ["B.png", "a/1.png", "a/b/2.png", "a/c.png", "a b.png", "a.png", "a0.png", "b/3.png", "Ünï/ß 1.png", "日本.png"]


def paths(files: object) -> list[str]:
    return [file.path for file in files]  # type: ignore[attr-defined]


def reason(file: InputFile) -> str:
    with pytest.raises(ImageError) as caught:
        file.read()
    return caught.value.reason


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of TREE, each of which contains its own name, and hidden files."""
    folder = tmp_path / "tree"
    for name in reversed(TREE):
        write(folder / name, name.encode())
    for hidden in (".DS_Store", "a/.hidden.png", ".git/x.png", "b/.cache/deep/x.png"):
        write(folder / hidden, b"hidden")
    (folder / "empty").mkdir()
    return folder


def pack(archive: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive of the given members, in the format that the file name says."""
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, data in members:
                zipped.writestr(name, data)
        return archive
    mode = {".tar": "w", ".xz": "w:xz", ".bz2": "w:bz2"}.get(archive.suffix, "w:gz")
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return archive


KINDS = pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip", ".ZIP"])


def test_folders_come_depth_first_with_names_in_byte_order(tree: Path) -> None:
    found = list(find([str(tree)]))
    assert paths(found) == TREE
    assert [file.read().decode() for file in found] == TREE


def test_names_that_are_not_utf_8_are_found_and_read(tmp_path: Path) -> None:
    for name in (b"\xff.png", b"a.png", "é.png".encode()):
        write(tmp_path / os.fsdecode(name), name)
    found = list(walk(tmp_path))
    assert [os.fsencode(file.path) for file in found] == [b"a.png", "é.png".encode(), b"\xff.png"]
    assert [file.read() for file in found] == [os.fsencode(file.path) for file in found]


@KINDS
def test_an_archive_gives_what_its_folder_gives(tree: Path, tmp_path: Path, kind: str) -> None:
    hidden = [(".DS_Store", b"x"), ("a/.hidden.png", b"x"), (".git/x.png", b"x")]
    archive = pack(tmp_path / f"tree{kind}", [*hidden, *((name, (tree / name).read_bytes()) for name in TREE)])
    packed = [(file.path, file.read()) for file in find([str(archive)])]
    assert packed == [(file.path, file.read()) for file in find([str(tree)])]


@KINDS
def test_an_archive_keeps_the_order_of_its_members(tmp_path: Path, kind: str) -> None:
    names = ["z.png", "a/2.png", "m.png", "a/1.png"]
    archive = pack(tmp_path / f"x{kind}", [(name, name.encode()) for name in names])
    assert paths(read_archive(archive)) == names


def test_an_archive_of_the_current_folder_has_clean_names(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tree, ".")
    assert sorted(paths(read_archive(tmp_path / "x.tar"))) == sorted(TREE)


@KINDS
@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png"])
def test_a_member_that_leaves_the_archive_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    archive = pack(tmp_path / f"x{kind}", [("good.png", b"1"), (name, b"2")])
    with pytest.raises(ConvlineError, match=r"leaves the archive.*evil"):
        list(read_archive(archive))


def test_links_out_of_a_tar_are_unsupported_and_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind, target in (("a", tarfile.SYMTYPE, "/etc/passwd"), ("b", tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    assert [(file.path, reason(file)) for file in read_archive(tmp_path / "x.tar")] == [
        ("a", "unsupported"),
        ("b", "unsupported"),
    ]


MEMBERS = [(f"{index}.png", os.urandom(700)) for index in range(9)]


@KINDS
def test_a_truncated_archive_is_refused(tmp_path: Path, kind: str) -> None:
    archive = pack(tmp_path / f"x{kind}", MEMBERS)
    whole = archive.read_bytes()
    for part in (0.1, 0.25, 0.5):
        archive.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ConvlineError, match="cannot read the archive"):
            list(read_archive(archive))


BLOCKS = 512 * 3  # a header and two blocks of data: where the next member of a tar begins


@pytest.mark.parametrize("cut", [4 * BLOCKS, 4 * BLOCKS + 100, 4 * BLOCKS + 600])
def test_a_tar_cut_between_members_or_inside_a_header_loses_no_file_silently(tmp_path: Path, cut: int) -> None:
    archive = pack(tmp_path / "x.tar", MEMBERS)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(read_archive(archive))


@pytest.mark.parametrize("kind", [".tar", ".tar.gz"])
def test_a_tar_with_a_damaged_header_loses_no_file_silently(tmp_path: Path, kind: str) -> None:
    plain = bytearray(pack(tmp_path / "plain.tar", MEMBERS).read_bytes())
    plain[4 * BLOCKS] ^= 0xFF  # the fifth member's name no longer matches its checksum
    archive = tmp_path / f"x{kind}"
    if kind == ".tar":
        archive.write_bytes(plain)
    else:
        archive.write_bytes(gzip.compress(plain))
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(read_archive(archive))


@KINDS
@pytest.mark.parametrize("data", [b"", b"this is not an archive" * 100])
def test_a_file_that_is_an_archive_only_by_name_is_refused(tmp_path: Path, kind: str, data: bytes) -> None:
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(read_archive(write(tmp_path / f"x{kind}", data)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_member_is_rejected_alone(tmp_path: Path, compression: int) -> None:
    archive = tmp_path / "x.zip"
    text = "".join(f"{index} " for index in range(2000)).encode()
    with zipfile.ZipFile(archive, "w", compression) as zipped:
        for name in ("a.png", "b.png", "c.png"):
            zipped.writestr(name, text)
        start = zipped.getinfo("b.png").header_offset + 30 + len("b.png")
    data = bytearray(archive.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    archive.write_bytes(data)
    first, damaged, last = read_archive(archive)
    assert (first.read(), last.read()) == (text, text)
    assert (damaged.path, reason(damaged)) == ("b.png", "unreadable")


def test_a_link_to_a_folder_that_contains_it_is_reported_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", b"1")
    (tmp_path / "a/up").symlink_to(tmp_path)
    found = list(walk(tmp_path))
    assert paths(found) == ["a/1.png", "a/up"]
    assert reason(found[1]) == "unreadable"


def test_a_link_to_itself_is_reported_and_its_neighbours_are_found(tmp_path: Path) -> None:
    for name in ("1.png", "3.png"):
        write(tmp_path / name, b"x")
    (tmp_path / "2.png").symlink_to("2.png")
    found = list(walk(tmp_path))
    assert paths(found) == ["1.png", "2.png", "3.png"]
    assert reason(found[1]) == "unreadable"


def test_links_to_files_and_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/1.png", b"1")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/file.png").symlink_to(tmp_path / "elsewhere/1.png")
    found = list(walk(tmp_path / "in"))
    assert paths(found) == ["file.png", "folder/1.png", "second/1.png"]
    assert [file.read() for file in found] == [b"1"] * 3


def test_a_dangling_link_is_found_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("nowhere.png")
    (file,) = walk(tmp_path)
    assert (file.path, reason(file)) == ("a.png", "unreadable")


def test_a_file_that_vanished_after_it_was_found_is_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", b"1")
    (file,) = walk(tmp_path)
    path.unlink()
    assert reason(file) == "unreadable"


@pytest.mark.timeout(30)  # it would block forever
def test_a_fifo_is_unsupported_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (file,) = walk(tmp_path)
    assert (file.path, reason(file)) == ("pipe.png", "unsupported")


def test_a_single_file_gives_its_name(tree: Path) -> None:
    (file,) = find([str(tree / "a/b/2.png")])
    assert (file.path, file.read()) == ("2.png", b"a/b/2.png")


def test_several_inputs_are_prefixed_as_given(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    pack(Path("x.tar"), [("t/9.png", b"9")])
    assert paths(find(["b", "a/b/", "./a.png", "x.tar", "b"])) == [
        "b/3.png",
        "a/b/2.png",
        "./a.png",
        "x.tar/t/9.png",
        "b/3.png",
    ]


def test_a_missing_input_is_refused_before_the_first_file(tree: Path) -> None:
    with pytest.raises(ConvlineError, match="nowhere"):
        find([str(tree), str(tree / "nowhere")])


def test_folders_of_a_folder_and_of_its_archives_are_equal(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tree, ".")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for path in tree.rglob("*"):
            zipped.write(path, path.relative_to(tree))
    expected = {"a", "a/b", "b", "empty", "Ünï"}
    assert folders(tree) == expected
    assert folders(tmp_path / "x.tar.gz") - {"."} == expected
    assert folders(tmp_path / "x.zip") == expected


# --- globs, lists, URLs


def test_a_glob_matches_what_the_shell_would_expand_it_to(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert paths(find(["*.png"])) == ["B.png", "a b.png", "a.png", "a0.png", "日本.png"]
    assert paths(find(["a*"])) == ["a/1.png", "a/b/2.png", "a/c.png", "a b.png", "a.png", "a0.png"]
    assert paths(find(["**/*.png"])) == TREE
    with pytest.raises(ConvlineError, match=r"nothing matches x\*"):
        find(["x*"])


def test_a_file_whose_name_looks_like_a_pattern_or_a_list_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[1]*.png", "@a.png"):
        write(tmp_path / name, name.encode())
        (file,) = find([name])
        assert (file.path, file.read()) == (name, name.encode())


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_a_list_gives_its_lines_as_given(tree: Path, monkeypatch: pytest.MonkeyPatch, separator: bytes) -> None:
    monkeypatch.chdir(tree)
    names = ["a.png", "./B.png", "nowhere.png", "b", "a.png", "Ünï/ß 1.png"]
    write(tree / "list.txt", separator.join(name.encode() for name in names) + separator)
    found = list(find(["@list.txt"]))
    assert paths(found) == ["a.png", "./B.png", "nowhere.png", "b/3.png", "a.png", "Ünï/ß 1.png"]
    assert reason(found[2]) == "unreadable"
    assert found[1].read() == b"B.png"
    with pytest.raises(ConvlineError, match=r"no such list of files: list2\.txt"):
        find(["@list2.txt"])


def test_names_in_a_list_may_be_any_bytes_and_longer_than_a_block(tmp_path: Path) -> None:
    names = [b"x" * 4000 + b"/%d\xff\nodd" % number for number in range(40)]
    write(tmp_path / "list", b"\0".join(names))
    assert [os.fsencode(file.path) for file in find([f"@{tmp_path / 'list'}"])] == names


LISTED = ["a.png", "Ünï/ß 1.png", "b", "日本.png", "nowhere.png"]
FOUND = ["a.png", "Ünï/ß 1.png", "b/3.png", "日本.png", "nowhere.png"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", "\0"])
def test_a_list_with_a_byte_order_mark_is_read_in_its_encoding(
    tree: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, separator: str
) -> None:
    monkeypatch.chdir(tree)
    if "\n" in separator:  # other separators are recognised by the first block
        monkeypatch.setattr("convline.inputs.path_lists.BLOCK", 7)
    text = ("\ufeff" if encoding.endswith("be") else "") + separator.join(LISTED) + separator
    write(tree / "list.txt", text.encode(encoding))
    found = list(find(["@list.txt"]))
    assert paths(found) == FOUND
    assert [file.read().decode() for file in found[:4]] == FOUND[:4]
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BufferedReader(BytesIO(text.encode(encoding)))))
    assert paths(find(["-"])) == FOUND


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["a.png\r\nb/3.png\r\n", "/a.png", "日本.png\n日/x.png\n", ".\n..\n"])
def test_a_list_in_utf_16_without_a_byte_order_mark_is_refused(tmp_path: Path, encoding: str, text: str) -> None:
    """It has a NUL beside every letter, and would be read as a list of folders such as "/"."""
    write(tmp_path / "list", text.encode(encoding))
    with pytest.raises(ConvlineError, match=r"list looks like UTF-16, and has no byte order mark; save it as UTF-8"):
        list(find([f"@{tmp_path / 'list'}"]))


@pytest.mark.parametrize("data", [b"\xff\xfea\0\n", b"\xff\xfe\0\0a\0", b"\xff\xfe\0\0\xff\xff\xff\xff"])
def test_a_list_that_is_invalid_in_its_encoding_is_refused(tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "list", data)
    with pytest.raises(ConvlineError, match=r"is damaged utf-(16|32)-le"):
        list(find([f"@{tmp_path / 'list'}"]))


def test_a_list_may_mix_line_endings(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    write(tree / "list.txt", b"a.png\r\nB.png\n\r\n\na0.png\r\r\na b.png")
    assert paths(find(["@list.txt"])) == ["a.png", "B.png", "a0.png", "a b.png"]


@pytest.mark.parametrize("given", [b".", b"./\n", b".\0", b"..\n", b"0\0001\0002\0", b".\0..\0"])
def test_lists_of_very_short_paths_are_not_mistaken_for_utf_16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bytes
) -> None:
    here = tmp_path / "in/here"
    for name in ("0/x", "1/x", "2/x"):
        write(here / name, b"x")
    monkeypatch.chdir(here)
    write(tmp_path / "list", given)
    (separator,) = b"\0" if b"\0" in given else b"\n"
    names = [os.fsdecode(name) for name in given.split(bytes([separator])) if name]
    expected = [str(path) for name in names for path in sorted(Path(name).rglob("x"))]
    assert [str(Path(file.path)) for file in find([f"@{tmp_path / 'list'}"])] == expected


def test_an_archive_in_a_list_that_cannot_be_read_is_one_reject(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    write(tree / "broken.zip", b"this is no archive")
    whole = pack(tree / "cut.tar.gz", [(f"{n}.png", os.urandom(9000)) for n in range(3)]).read_bytes()
    write(tree / "cut.tar.gz", whole[:-5000])
    pack(tree / "hostile.tar", [("good.png", b"1"), ("../evil.png", b"2")])
    write(tree / "list.txt", b"a.png\nbroken.zip\ncut.tar.gz\nhostile.tar\nB.png\n")
    found = list(find(["@list.txt"]))
    expected = ["a.png", "broken.zip", "cut.tar.gz/0.png", "cut.tar.gz/1.png", "cut.tar.gz", "hostile.tar/good.png"]
    assert paths(found) == [*expected, "hostile.tar", "B.png"]
    assert {file.path for file in found if not file.path.endswith(".png")} == {
        file.path for file in found if isinstance(file.location, Rejected)
    }
    assert sorted(paths(find(["*.zip"]))) == ["broken.zip"]
    # an archive that is itself an input must be readable
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(find(["broken.zip"]))


def test_standard_input_is_a_list(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BufferedReader(BytesIO(b"a.png\n\nb/3.png"))))
    assert paths(find(["-"])) == ["a.png", "b/3.png"]


def test_folders_nested_deeper_than_python_recurses(tmp_path: Path) -> None:
    depth = 1500
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):  # a path of that length cannot be created at once
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("x.png", os.O_CREAT, dir_fd=here))
    os.close(here)
    try:
        (file,) = walk(tmp_path)
        assert file.path.startswith("d/d/d/") and file.path.count("/") == depth
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # pytest cannot remove it


def test_a_folder_that_cannot_be_read_is_reported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(folder: str) -> object:
        if str(folder).endswith("/a"):  # simulated, as root may read all folders
            raise PermissionError(13, "Permission denied")
        return real(folder)

    real = os.scandir
    monkeypatch.setattr("os.scandir", scandir)
    found = list(walk(tree))
    assert paths(found) == ["B.png", "a", *TREE[4:]]
    assert reason(found[1]) == "unreadable"


def test_members_of_a_tar_are_read_in_place(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.tar", MEMBERS)
    found = list(read_archive(archive))
    assert all(isinstance(file.location, OnDisk) for file in found)
    assert [(file.path, file.read()) for file in found] == MEMBERS
    archive.write_bytes(archive.read_bytes()[: 8 * BLOCKS])  # as if it was cut while a job was running
    assert reason(found[8]) == "truncated"


@pytest.fixture
def remote(tree: Path) -> Iterator[str]:
    """The URL of a copy of the tree."""
    system = fsspec.filesystem("memory")
    system.put(str(tree), "/bucket/tree", recursive=True)
    yield "memory://bucket/tree"
    system.rm("/bucket", recursive=True)


def test_a_url_gives_what_its_folder_gives(remote: str) -> None:
    found = list(find([remote]))
    assert paths(found) == TREE
    assert [file.read().decode() for file in found] == TREE
    assert paths(find([f"{remote}/a", f"{remote}/a.png"])) == [
        *(f"{remote}/a/{name}" for name in ("1.png", "b/2.png", "c.png")),
        f"{remote}/a.png",
    ]
    assert paths(find([f"{remote}/a.png"])) == ["a.png"]
    assert [path.rpartition("/")[2] for path in paths(find([f"{remote}/a*.png"]))] == ["a b.png", "a.png", "a0.png"]


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_an_archive_at_a_url_is_read_in_place(tmp_path: Path, kind: str) -> None:
    archive = pack(tmp_path / f"x{kind}", MEMBERS)
    fsspec.filesystem("memory").pipe(f"/bucket/x{kind}", archive.read_bytes())
    assert [(file.path, file.read()) for file in find([f"memory://bucket/x{kind}"])] == MEMBERS


def test_urls_in_a_list_are_files(remote: str, tmp_path: Path) -> None:
    write(tmp_path / "list", f"{remote}/a.png\n{remote}/nowhere.png\n".encode())
    existing, missing = find([f"@{tmp_path / 'list'}"])
    assert existing.read() == b"a.png" and missing.path == f"{remote}/nowhere.png"
    assert reason(missing) == "unreadable"


@pytest.mark.parametrize("url", ["memory://nowhere", "memory://nowhere/*.png", "nosuchthing://x"])
def test_a_url_without_files_is_refused_before_the_first_file(url: str) -> None:
    with pytest.raises(ConvlineError, match=re.escape(url)):
        find([url])


def test_folders_that_link_to_each_other_are_not_walked_endlessly(tmp_path: Path) -> None:
    for folder in "abcdefgh":
        write(tmp_path / folder / "x.png", folder.encode())
        for other in "abcdefgh":
            (tmp_path / folder / f"to {other}").symlink_to(f"../{other}")
    found = list(walk(tmp_path))
    assert {file.path for file in found} >= {f"{folder}/x.png" for folder in "abcdefgh"}
    assert all(file.path.count("/to ") <= 5 for file in found)


def test_a_recursive_glob_finds_each_file_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert paths(find(["**"])) == TREE
    assert paths(find(["a/**"])) == [path for path in TREE if path.startswith("a/")]


def test_a_glob_holds_little_more_than_the_names_it_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5000):
        write(tmp_path / f"in/{number // 100:03}/{number:06}.png", b"")
    monkeypatch.chdir(tmp_path)
    list(find(["in/*/*.png"]))
    tracemalloc.start()
    try:
        next(find(["in/*/*.png"]))
        assert tracemalloc.get_traced_memory()[1] / 5000 < 250  # bytes, of which a name and its reference take 75
    finally:
        tracemalloc.stop()


def test_a_nul_in_a_text_list_costs_one_line(tree: Path) -> None:
    write(tree / "list.txt", b"x" * 70_000 + b"\n" + str(tree / "a.png").encode() + b"\nodd\0name\n")
    found = list(find([f"@{tree / 'list.txt'}"]))
    assert [file.location.version() is None for file in found] == [True, False, True]
    assert (reason(found[0]), reason(found[2])) == ("unreadable", "unreadable")


def test_a_zip_with_a_malformed_name_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", [("é.png", b"1")])
    archive.write_bytes(archive.read_bytes().replace("é.png".encode(), b"\xff\xff.png"))
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(read_archive(archive))


def test_members_of_a_zip_are_read_in_place(tmp_path: Path) -> None:
    found = pickle.loads(pickle.dumps(list(read_archive(pack(tmp_path / "x.zip", MEMBERS)))))
    assert len(pickle.dumps(found)) < sum(len(data) for _, data in MEMBERS)
    assert [(file.path, file.read()) for file in found] == MEMBERS
