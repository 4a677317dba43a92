"""Archives (zip, tar): every member becomes a file or a reject; odd names, links, sparse and damaged members."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest

from convline.errors import ConvlineError, ImageError
from convline.inputs import archive_members
from convline.inputs.archive_members import MemoryWindow
from convline.inputs.archives import read_archive
from convline.inputs.input_file import InMemory, InputFile
from convline.inputs.listing import find, folders
from convline.inputs.tar_archives import InTar
from tests.conftest import command
from tests.serving.helpers import write

Listing = dict[str, bytes | str]  # the bytes of each path, or the reject's reason code


def outcome(file: InputFile) -> bytes | str:
    try:
        return file.read()
    except ImageError as problem:
        return problem.reason


def listing(source: Path) -> Listing:
    found = list(find([str(source)]))
    assert len({file.path for file in found}) == len(found)
    return {file.path: outcome(file) for file in found}


def tar_of(path: Path, *tars: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Concatenated archives, each with its end mark; compressed as the file name says."""
    plain = io.BytesIO()
    for one in tars:
        with tarfile.open(fileobj=plain, mode="w") as tar:
            for info, data in one:
                tar.addfile(info, io.BytesIO(data))
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return write(path, packers.get(path.suffix, bytes)(plain.getvalue()))


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, to, len(data)
    return info, data


def hard(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, kind=tarfile.LNKTYPE, to=to)


def soft(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, kind=tarfile.SYMTYPE, to=to)


TARS = pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])


# --- a folder and any archive of it


def test_a_folder_with_links_and_its_archives_give_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("a/1.png", "a/2.png", "b/3.png", ".store/4.png", "a/.hidden.png"):
        write(folder / name, name.encode() * 100)
    os.link(folder / "a/1.png", folder / "a/copy of 1.png")
    os.link(folder / "a/1.png", folder / "b/another.png")
    for name, target in (("a/0.png", "../b/3.png"), ("b/5.png", "../.store/4.png"), ("b/6.png", "5.png")):
        (folder / name).symlink_to(target)
    (folder / "b/gone.png").symlink_to("nowhere.png")
    expected = listing(folder)
    assert len(expected) == 9 and expected["b/gone.png"] == "unreadable"
    for kind in ("w", "w:gz", "w:xz"):
        archive = tmp_path / f"d.tar{kind[1:].replace(':', '.')}"
        with tarfile.open(archive, kind) as tar:
            tar.add(folder, ".")
        assert listing(archive) == expected
    subprocess.run(["zip", "-qry", tmp_path / "d.zip", "."], cwd=folder, check=True)
    assert listing(tmp_path / "d.zip") == expected


@pytest.mark.parametrize("kind", ["v7", "ustar", "gnu", "oldgnu", "posix"])
def test_what_gnu_tar_writes_is_read_in_each_of_its_formats(tmp_path: Path, kind: str) -> None:
    names = ["a/1.png", "é/日本.png", "a b/'x'.png", os.fsdecode(b"\xff/\xfe.png")]
    if kind in ("ustar", "posix", "gnu", "oldgnu"):
        names.append("/".join(["folder" * 8] * 4) + "/x.png")
    if kind in ("posix", "gnu", "oldgnu"):
        names.append("/".join(["folder" * 8] * 9) + "/x.png")
    folder = tmp_path / "d"
    for name in names:
        write(folder / name, os.fsencode(name) * 50)
        if len(name) < 100 or kind != "ustar":  # ustar limits the target of a link to 100 bytes
            os.link(folder / name, folder / f"{name} once more.png")
    subprocess.run(["tar", "-cf", tmp_path / "d.tar", f"--format={kind}", "-C", folder, "."], check=True)
    assert listing(tmp_path / "d.tar") == listing(folder)


@pytest.mark.parametrize("options", [["gnu"], ["posix", "0.0"], ["posix", "0.1"], ["posix", "1.0"]])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_sparse_members_keep_their_holes(tmp_path: Path, options: list[str], ending: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name, at in (("hole first", [90_000]), ("many", [8192 * n for n in range(60)]), ("hole last", [0, 40_000])):
        with (folder / name).open("wb") as file:
            for position in at:
                file.seek(position)
                file.write(b"some data")
            file.truncate(600_000)
    write(folder / "whole", b"x" * 1000)
    version = [f"--sparse-version={options[1]}"] if options[1:] else []
    packed = ["-z"] if ending == ".tar.gz" else []
    command = ["tar", *packed, "-cf", f"{tmp_path}/d{ending}", f"--format={options[0]}", "--sparse", *version]
    subprocess.run([*command, "-C", folder, "."], check=True)
    assert (tmp_path / f"d{ending}").stat().st_size < 300_000
    assert listing(tmp_path / f"d{ending}") == listing(folder)


def test_the_label_and_folders_of_a_tar_are_not_files(tmp_path: Path) -> None:
    write(tmp_path / "d/a/1.png", b"1")
    options = ["--format=gnu", "--label=/dev/st0 ../x", f"--listed-incremental={tmp_path / 'since'}"]
    subprocess.run(["tar", "-cf", tmp_path / "d.tar", *options, "-C", tmp_path, "d"], check=True)
    assert listing(tmp_path / "d.tar") == {"d/a/1.png": b"1"}


# --- links


@TARS
def test_a_link_in_a_tar_gives_its_target_before_or_after_it(tmp_path: Path, ending: str) -> None:
    archive = tar_of(
        tmp_path / f"x{ending}",
        [
            hard("early.png", "./b/1.png"),
            soft("to early.png", "early.png"),
            entry("b/1.png", b"one"),
            hard("b/late.png", "b/1.png"),
            soft("b/soft.png", "../c/2.png"),
            entry("c/2.png", b"two"),
            hard(".hidden.png", "c/2.png"),
            hard("from hidden.png", ".hidden.png"),
        ],
    )
    assert listing(archive) == {
        **dict.fromkeys(("b/1.png", "early.png", "to early.png", "b/late.png"), b"one"),
        **dict.fromkeys(("c/2.png", "b/soft.png", "from hidden.png"), b"two"),
    }


@TARS
def test_a_link_to_no_file_becomes_a_reject(tmp_path: Path, ending: str) -> None:
    names = {
        "nowhere": hard("nowhere", "b/0.png"),
        "folder": soft("folder", "b"),
        "self": soft("self", "self"),
        "one": soft("one", "other"),
        "other": soft("other", "one"),
        "out": soft("out", "../x.png"),
        "absolute": soft("absolute", "/etc/passwd"),
        "hard out": hard("hard out", "/etc/passwd"),
    }
    out = {"out", "absolute", "hard out"}
    archive = tar_of(tmp_path / f"x{ending}", [*names.values(), entry("b/1.png", b"one")])
    assert listing(archive) == {
        "b/1.png": b"one",
        **{name: "unsupported" if name in out else "unreadable" for name in names},
    }


def test_links_beyond_the_limit_become_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "LINK_TABLE_BYTES", 100)
    links = [hard(f"{number}.png", "a.png") for number in range(20)]
    found = listing(tar_of(tmp_path / "x.tar", [entry("a.png", b"a"), *links]))
    assert len(found) == 21 and set(found.values()) == {b"a", "unsupported"}


def test_a_link_to_no_file_in_a_zip_becomes_a_reject(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        zipped.writestr("b/1.png", b"one")
        for name, target in (("out", "../../x"), ("self", "self"), ("nowhere", "b/2.png"), ("folder", "b")):
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            zipped.writestr(info, target)
    unreadable = dict.fromkeys(["self", "nowhere", "folder"], "unreadable")
    assert listing(tmp_path / "x.zip") == {"b/1.png": b"one", "out": "unsupported", **unreadable}


def test_special_members_become_rejects(tmp_path: Path) -> None:
    kinds = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"M", b"Z"]
    archive = tar_of(tmp_path / "x.tar", [entry(f"{number}", kind=kind) for number, kind in enumerate(kinds)])
    assert listing(archive) == {f"{number}": "unsupported" for number in range(len(kinds))}


# --- ends


@TARS
def test_concatenated_archives_lose_no_file(tmp_path: Path, ending: str) -> None:
    expected: Listing = {"a.png": b"a", "b.png": b"b", "link.png": b"a", "c.png": b"c" * 3000}
    parts = [
        [entry("a.png", b"a")],
        [],
        [entry("b.png", b"b"), hard("link.png", "a.png")],
        [entry("c.png", b"c" * 3000)],
    ]
    assert listing(tar_of(tmp_path / f"x{ending}", *parts)) == expected
    alone = [tar_of(tmp_path / f"{number}{ending}", part).read_bytes() for number, part in enumerate(parts)]
    assert listing(write(tmp_path / f"cat{ending}", b"".join(alone))) == expected


def test_what_tar_concatenates_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tar_of(tmp_path / f"{name}.tar", [entry(f"{name}.png", name.encode())])
    subprocess.run(["tar", "--concatenate", "-f", tmp_path / "a.tar", tmp_path / "b.tar"], check=True)
    assert listing(tmp_path / "a.tar") == {"a.png": b"a", "b.png": b"b"}


@TARS
@pytest.mark.parametrize("behind", [b"something else", b"\0" * 512 + b"x" * 600])
def test_data_after_an_end_mark_that_is_not_a_tar_is_refused(tmp_path: Path, ending: str, behind: bytes) -> None:
    packed = tar_of(tmp_path / f"x{ending}", [entry("a.png", b"a")])
    data = {".gz": gzip, ".bz2": bz2, ".xz": lzma}.get(packed.suffix)
    plain = (data.decompress(packed.read_bytes()) if data else packed.read_bytes()) + behind
    packed.write_bytes(data.compress(plain) if data else plain)
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        listing(packed)


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_damaged_second_compressed_stream_is_refused(tmp_path: Path, ending: str) -> None:
    first, second = (tar_of(tmp_path / f"{n}{ending}", [entry(f"{n}.png", b"x")]).read_bytes() for n in "ab")
    for damaged in (b"\xff" + second[1:], second[: len(second) // 2], b"not compressed"):
        with pytest.raises(ConvlineError, match="cannot read the archive"):
            listing(write(tmp_path / f"x{ending}", first + damaged))
    assert set(listing(write(tmp_path / f"x{ending}", first + bytes(100_000) + second))) == {"a.png", "b.png"}


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_wrong_checksum_at_the_end_of_a_compressed_tar_is_found(tmp_path: Path, ending: str) -> None:
    """All members have been read by then, but their bytes may be wrong."""
    packed = tar_of(tmp_path / f"x{ending}", [entry("a.png", os.urandom(3000))])
    data = bytearray(packed.read_bytes())
    data[{".gz": -8, ".bz2": -2, ".xz": -26}[packed.suffix]] ^= 1
    packed.write_bytes(data)
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        listing(packed)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
def test_an_archive_without_files_is_empty(tmp_path: Path, ending: str) -> None:
    if ending == ".zip":
        zipfile.ZipFile(tmp_path / "x.zip", "w").close()
    else:
        tar_of(tmp_path / f"x{ending}", [])
    assert listing(tmp_path / f"x{ending}") == {}


# --- names


def zip_of(path: Path, names: list[bytes], system: int = 3, flags: int = 0, extra: bytes = b"") -> Path:
    """A zip written by hand, as by tools that do not state the encoding of names; each file contains its name."""
    out, central = b"", b""
    for name in names:
        data = b"" if name.endswith((b"/", b"\\")) else name
        fields = struct.pack("<HHHHHIII", 20, flags, 0, 0, 33, zlib.crc32(data), len(data), len(data))
        head = struct.pack("<HH", len(name), len(extra))
        central += b"PK\1\2" + struct.pack("<H", system << 8 | 30) + fields + head
        central += struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16 if system == 3 else 0, len(out)) + name + extra
        out += b"PK\3\4" + fields + head + name + extra + data
    end = struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(central), len(out), 0)
    return write(path, out + central + b"PK\5\6" + end)


def test_utf_8_names_are_decoded_even_if_the_zip_does_not_say_that_they_are(tmp_path: Path) -> None:
    names = ["Café/1.png", "猫/2.png", "cafe\u0301/3.png", "😀.png"]
    archive = zip_of(tmp_path / "x.zip", [name.encode() for name in names])
    assert listing(archive) == {name: name.encode() for name in names}


def test_the_unicode_path_field_is_used_only_if_its_checksum_matches_the_name(tmp_path: Path) -> None:
    raw, name = "猫.png".encode("cp932"), "猫.png"
    for about, expected in ((raw, name), (b"renamed since", os.fsdecode(raw))):
        field = b"\1" + struct.pack("<I", zlib.crc32(about)) + name.encode()
        extra = struct.pack("<HH", 0x5455, 1) + b"x" + struct.pack("<HH", 0x7075, len(field)) + field
        assert listing(zip_of(tmp_path / "x.zip", [raw], extra=extra)) == {expected: raw}


@pytest.mark.parametrize("encoding", ["cp932", "gbk", "cp437", "latin-1"])
def test_names_in_an_unknown_encoding_keep_their_bytes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], encoding: str
) -> None:
    name = {"cp932": "表/日本.png", "gbk": "猫/联通.png"}.get(encoding, "Café/é.png")
    archive = zip_of(tmp_path / "x.zip", [name.encode(encoding), b"ascii.png"], system=0)
    expected = {os.fsdecode(name.encode(encoding)): name.encode(encoding), "ascii.png": b"ascii.png"}
    assert listing(archive) == listing(archive) == expected
    (line,) = capfd.readouterr().err.splitlines()  # once
    assert "does not state the encoding of 1 of its names" in line
    with zipfile.ZipFile(archive, metadata_encoding=encoding) as zipped:  # what the line advises
        zipped.extractall(tmp_path / "d")
    assert set(listing(tmp_path / "d")) == {name, "ascii.png"}


@pytest.mark.parametrize("system", [0, 6, 10, 11, 14])
def test_backslashes_separate_folders_in_a_zip_from_windows(tmp_path: Path, system: int) -> None:
    names = [b"pets\\", b"pets\\red\\", b"pets\\red\\1.png", b"pets\\.hidden\\2.png", b"both/red\\3.png"]
    archive = zip_of(tmp_path / "x.zip", names, system)
    assert set(listing(archive)) == {"pets/red/1.png", "both/red/3.png"}
    with pytest.raises(ConvlineError, match="leaves the archive"):
        listing(zip_of(tmp_path / "y.zip", [b"..\\x.png"], system))


def test_a_backslash_in_a_unix_name_stays_a_backslash(tmp_path: Path) -> None:
    names = ["a\\b.png", "a\\.c.png"]
    for name in names:
        write(tmp_path / "d" / name, name.encode())
    assert set(listing(tmp_path / "d")) == set(names)
    assert set(listing(zip_of(tmp_path / "x.zip", [name.encode() for name in names]))) == set(names)
    assert set(listing(tar_of(tmp_path / "x.tar", [entry(name, b"x") for name in names]))) == set(names)


@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_odd_names_are_normalised_or_become_rejects(tmp_path: Path, kind: str) -> None:
    names = {"./a/../b.png": "b.png", "c//d.png": "c/d.png", "./e/./f.png": "e/f.png", "a b\n.png": "a b\n.png"}
    if kind == ".zip":
        archive = zip_of(tmp_path / "x.zip", [name.encode() for name in (*names, "nul\0l.png", ".")])
    else:
        archive = tar_of(tmp_path / "x.tar", [entry(name, b"x") for name in (*names, ".")])
    found = listing(archive)
    assert set(found) == {*names.values(), "."} | ({"nul\0l.png"} if kind == ".zip" else set())
    assert found["."] == "unsupported"


def test_a_name_with_a_nul_in_a_pax_header_stays_one_name(tmp_path: Path) -> None:
    records = b"".join(b"%d %s" % (len(record) + 3, record) for record in (b"path=a\0b.png\n", b"comment=x\n"))
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(records)
    plain = extended.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    plain += tarfile.TarInfo("a").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    assert listing(write(tmp_path / "x.tar", plain)) == {"a\0b.png": b""}


def test_members_of_the_same_name_are_all_found(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "x.tar", [entry("a.png", b"1"), entry("a.png", b"2")])
    assert [(file.path, file.read()) for file in read_archive(archive)] == [("a.png", b"1"), ("a.png", b"2")]


@pytest.mark.parametrize("kind", ["folder", ".tar", ".zip"])
def test_hidden_folders_of_images_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    source = tmp_path / "d"
    for name in ("cat/1.png", ".dog/1.png", ".dog/in/2.JPG", "cat/.old/3.png", ".git/config", "__MACOSX/cat/._1.png"):
        write(source / name, b"x")
    (source / "empty").mkdir()
    if kind != "folder":
        source = Path(shutil.make_archive(str(source), kind[1:], source))
    capfd.readouterr()
    assert folders(source) - {"."} == {"cat", "empty"}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("skipped hidden folders") and ".git" not in line
    assert ".dog (2 images), cat/.old (1 images)" in line


@pytest.mark.parametrize("name", ["x.7z", "x.rar", "x.tar.zst", "x.png.gz", "x.xz", "X.TAR.LZ4"])
def test_unsupported_archives_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "in" / name, b"whatever")
    with pytest.raises(ConvlineError, match=r"is not supported; unpack it and give the folder"):
        find([str(path)])
    fsspec.filesystem("memory").pipe(f"/bucket/{name}", b"x")
    with pytest.raises(ConvlineError, match=r"is not supported; unpack it"):
        find([f"memory://bucket/{name}"])
    assert [file.path for file in find([str(tmp_path / "in")])] == [name]  # in a folder it is a file like any other
    write(tmp_path / "list", f"{path}\n".encode())
    for given in (f"@{tmp_path / 'list'}", str(tmp_path / "in/*")):
        (file,) = find([given])
        assert (file.path, outcome(file)) == (str(path), "unreadable")


# --- memory


@pytest.fixture
def no_member_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat all members as too large to hold in memory."""
    monkeypatch.setattr(archive_members, "WINDOW_BYTES", -1)


MEMBERS: Listing = {f"{number}.png": os.urandom(100_000 + number) for number in range(5)}


def entries() -> list[tuple[tarfile.TarInfo, bytes]]:
    return [entry(name, data) for name, data in MEMBERS.items() if isinstance(data, bytes)]


@pytest.mark.usefixtures("no_member_in_memory")
@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_members_not_held_in_memory_are_read_again(tmp_path: Path, ending: str) -> None:
    archive = tar_of(tmp_path / f"x{ending}", entries())
    found = pickle.loads(pickle.dumps(list(read_archive(archive))))
    assert all(isinstance(file.location, InTar) for file in found)
    assert len(pickle.dumps(found)) < 10_000
    for order in (found, found[::-1], found[2:]):
        assert [file.read() for file in order] == [MEMBERS[file.path] for file in order]


def test_a_member_has_the_same_version_whether_it_is_held_in_memory_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_of(tmp_path / "x.tar.gz", entries())
    held = list(read_archive(archive))
    monkeypatch.setattr(archive_members, "WINDOW_BYTES", -1)
    again = list(read_archive(archive))
    assert all(isinstance(file.location, InMemory) for file in held)
    assert [file.location.version() for file in held] == [file.location.version() for file in again]


@pytest.mark.usefixtures("no_member_in_memory")
def test_a_member_of_an_archive_that_was_replaced_is_unreadable(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "x.tar.gz", entries())
    found = list(read_archive(archive))
    tar_of(archive, [(info, data[::-1]) for info, data in entries()])
    assert {outcome(file) for file in found} == {"unreadable"}
    archive.unlink()
    assert {outcome(file) for file in found} == {"unreadable"}


@pytest.mark.usefixtures("no_member_in_memory")
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_remote_members_not_held_in_memory_are_read_again(tmp_path: Path, ending: str) -> None:
    data = tar_of(tmp_path / f"x{ending}", entries()).read_bytes()
    fsspec.filesystem("memory").pipe(f"/bucket/x{ending}", data)
    found = list(find([f"memory://bucket/x{ending}"]))
    assert {file.path: file.read() for file in found} == MEMBERS


def test_consecutive_members_in_memory_stay_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "WINDOW_BYTES", 1000)
    sizes = [*np.random.default_rng(0).integers(0, 30, 3000).tolist(), 1001, 1000, 0]
    window = MemoryWindow()
    held = [size if window.admits(size) else 0 for size in sizes]
    sums = np.convolve(held, np.ones(archive_members.WINDOW, int))
    assert 900 < sums.max() <= 1000
    assert held[-3] == 0 and 0 < np.count_nonzero(held) < len(held)


def grown(code: str, *arguments: object) -> int:
    """The MiB by which a process's peak memory grows while it runs `code`."""
    script = f"""
import resource, sys
from serving.classifier import try_decode
from convline.images import ImageSpec
from convline.inputs.listing import find
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{code}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


BATCH = """
files = list(find(sys.argv[1:]))  # at most one batch
for file in files:
    file.record_version()
results = [try_decode(file, ImageSpec(8, 8, 3)) for file in files]
"""


def test_a_small_archive_of_large_members_takes_the_memory_of_one(tmp_path: Path) -> None:
    """Members that do not fit into memory are read from the archive again."""
    zeros = bytes(2**23)
    archive = tar_of(tmp_path / "x.tar.gz", [entry(f"{number}.png", zeros) for number in range(10)])
    assert archive.stat().st_size < 2**20
    limit = "from convline.inputs import archive_members; archive_members.WINDOW_BYTES = 2**20\n"
    assert grown(limit + BATCH, archive) < 30  # of 80


@pytest.mark.slow
@pytest.mark.parametrize(("count", "size"), [(24, 100_000_000), (70, 30_000_000)])
def test_a_job_on_a_small_archive_of_large_members_takes_little_memory(
    model: Path, tmp_path: Path, count: int, size: int
) -> None:
    """In one process for up to one batch of files, in several for more."""
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for number in range(count):
            tar.addfile(entry(f"{number}.png", bytes(size))[0], io.BytesIO(bytes(size)))
    assert (tmp_path / "x.tar.gz").stat().st_size < 3e6
    arguments = command(
        "serving", "classify", tmp_path / "x.tar.gz", "--model", model, "--output", tmp_path / "out.csv"
    )
    most = 0
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        job = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                most = max(most, sum(part.memory_info().rss for part in (job, *job.children())))
            time.sleep(0.02)
    assert process.returncode == 0
    assert (tmp_path / "out.csv.rejects.jsonl").read_bytes().count(b"not-an-image") == count
    assert most < 800e6  # in each process: a model, the libraries and one member


def test_a_zip_member_takes_no_more_memory_than_its_header_states(tmp_path: Path) -> None:
    """Even if its compressed data would grow to more."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a.png", bytes(2**26))
        info = zipped.getinfo("a.png")
    data = (tmp_path / "x.zip").read_bytes().replace(struct.pack("<I", info.file_size), struct.pack("<I", 1000))
    write(tmp_path / "x.zip", data)
    assert grown(BATCH, tmp_path / "x.zip") < 30
    assert set(listing(tmp_path / "x.zip").values()) == {"unreadable"}


def test_an_xz_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    data = bytearray(lzma.compress(tar_of(tmp_path / "x.tar", entries()).read_bytes()))
    size = (data[12] + 1) * 4  # size of the block header with its checksum (sections 3.1 and 5.3.1 of the format)
    assert data[14:16] == b"\x21\x01"  # LZMA2, with one byte of properties
    data[16] = 35  # a dictionary of 768 MiB
    data[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(data[12 : 12 + size - 4]))
    with pytest.raises(ConvlineError, match="Memory usage limit exceeded"):
        listing(write(tmp_path / "x.tar.xz", bytes(data)))


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_an_endless_header_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2**31
    head = info.tobuf(tarfile.GNU_FORMAT)
    packer = zlib.compressobj(wbits=31)
    data = packer.compress(head) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    write(tmp_path / "x.tar.gz", data)
    with pytest.raises(ConvlineError, match="a header of more than"):
        listing(tmp_path / "x.tar.gz")


@pytest.mark.parametrize(
    "size", [b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"0x1\0" * 3]
)
@pytest.mark.timeout(30)
def test_an_impossible_size_is_refused(tmp_path: Path, size: bytes) -> None:
    head = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(read_archive(write(tmp_path / "x.tar", bytes(head) + bytes(2048))))
    with pytest.raises(ConvlineError, match="cannot read the archive"):
        list(read_archive(write(tmp_path / "x.tar.gz", gzip.compress(bytes(head) + bytes(2048)))))


# --- damage

TEXT = b"".join(b"%d " % number for number in range(1500))
PAYLOAD = {
    "a.png": TEXT,
    "b/é.png": os.urandom(2000),
    "b/" + "long" * 40 + ".png": TEXT[::-1],
    "c.png": b"",
    "d.png": bytes(range(256)) * 8,
}


LINKS = [hard("link.png", "a.png"), soft("soft.png", "b/é.png"), hard("no.png", "no")]


def zipped(method: int) -> Callable[[], bytes]:
    def make() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in PAYLOAD.items():
                archive.writestr(name, data)
        return buffer.getvalue()

    return make


def tarred(pack: Callable[[bytes], bytes], kind: int, *, linked: bool = False) -> Callable[[], bytes]:
    def make() -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name, data in PAYLOAD.items():
                tar.addfile(entry(name, data)[0], io.BytesIO(data))
            for info, _ in LINKS if linked else ():
                tar.addfile(info)
        return pack(buffer.getvalue())

    return make


KINDS: dict[str, Callable[[], bytes]] = {
    "plain.tar": tarred(bytes, tarfile.GNU_FORMAT),
    "links.tar": tarred(bytes, tarfile.PAX_FORMAT, linked=True),
    "x.tar.gz": tarred(gzip.compress, tarfile.PAX_FORMAT),
    "x.tar.bz2": tarred(bz2.compress, tarfile.GNU_FORMAT, linked=True),
    "x.tar.xz": tarred(lzma.compress, tarfile.PAX_FORMAT, linked=True),
    "stored.zip": zipped(zipfile.ZIP_STORED),
    "deflated.zip": zipped(zipfile.ZIP_DEFLATED),
    "bzip2.zip": zipped(zipfile.ZIP_BZIP2),
    "lzma.zip": zipped(zipfile.ZIP_LZMA),
}


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """One of: a bit flipped, an extreme value, bytes removed, the end cut off, bytes doubled."""
    at = int(random.integers(len(data)))
    length = int(random.integers(1, max(2, len(data) // 4)))
    how = random.integers(5)
    if how == 0:
        return data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :]
    if how == 1:
        return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]
    if how == 2:
        return data[:at] + data[at + length :]
    if how == 3:
        return data[:at]
    return data[: at + length] + data[at:]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("held", [archive_members.WINDOW_BYTES, -1])
@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_a_damaged_archive_is_refused_or_its_members_become_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, held: int, count: int
) -> None:
    monkeypatch.setattr(archive_members, "WINDOW_BYTES", held)
    random = np.random.default_rng(count)
    whole = KINDS[name]()
    right: Listing = {**PAYLOAD, "link.png": TEXT, "soft.png": PAYLOAD["b/é.png"]}
    read = refused = 0
    for _ in range(count):
        archive = write(tmp_path / name, damaged(whole, random))
        try:
            found = list(read_archive(archive))
        except ConvlineError:
            refused += 1
            continue
        for file in found:
            content = outcome(file)
            # a plain .tar has no checksums for contents and for names in extended headers
            assert archive.suffix == ".tar" or isinstance(content, str) or content == right[file.path]
            read += 1
    assert refused and (read or name.startswith("x.tar"))
