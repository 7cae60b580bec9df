"""Walking tars: the same members as Python's own reader finds, the same samples as webdataset makes of them."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from megatron_groupmates.pool.formats import archive
from megatron_groupmates.pool.formats.archive import HashingFile, key_and_suffix, read_keys, walk_tar
from tests.pool.tars import tar_bytes

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
ASCII_NAMES = st.from_regex(r"([a-c]{1,3}/)?[a-c_]{1,4}(\.(bin|json|json\.gz))?", fullmatch=True)
LONG_NAMES = st.from_regex(r"([a-cä]{60}/){0,3}[a-c]{1,120}(\.bin)?", fullmatch=True)
CONTENTS = st.one_of(st.none(), st.binary(max_size=1500))


def with_tarfile(content: bytes) -> list[tuple[str, int, bytes, int]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return [(info.name, info.offset_data, tar.extractfile(info).read(), info.offset) for info in tar if info.isreg()]


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_same_members_as_tarfile(name: str, data: st.DataObject) -> None:
    names = ASCII_NAMES if name == "ustar" else st.one_of(ASCII_NAMES, LONG_NAMES)
    content = tar_bytes(data.draw(st.lists(st.tuples(names, CONTENTS), max_size=8)), FORMATS[name])
    expected = with_tarfile(content)
    file = HashingFile(io.BytesIO(content))
    found = list(walk_tar(file))
    assert [(member.name, member.offset, member.content, member.start) for member in found] == expected
    assert [member.num_bytes for member in found] == [len(entry[2]) for entry in expected]
    assert (file.finish(), file.num_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    headers = list(walk_tar(io.BytesIO(content), headers_only=True))
    assert [(member.name, member.offset, member.num_bytes, member.start) for member in headers] == [
        (member.name, member.offset, member.num_bytes, member.start) for member in found
    ]


@given(members=st.lists(st.tuples(ASCII_NAMES, CONTENTS), max_size=12))
@settings(deadline=None, max_examples=50)
def test_same_samples_as_webdataset(members: list[tuple[str, bytes | None]]) -> None:
    # Members with one name next to each other are an error to webdataset.
    members = [(f"{name}.{number}" if "." in name else name, content) for number, (name, content) in enumerate(members)]
    content = tar_bytes(members)
    files = tar_file_expander([{"url": "u", "stream": io.BytesIO(content)}])
    expected = [(sample["__key__"], len([name for name in sample if not name.startswith("__")])) for sample in group_by_keys(files)]
    keys = read_keys(io.BytesIO(content))
    numbers = [number for number, _ in keys.sample_at.values()]
    counts = [numbers.count(number) for number in range(len(keys.keys))]
    assert list(zip(keys.keys, counts, strict=True)) == expected
    assert len(keys.starts) == len(keys.keys) + 1 and keys.starts == sorted(keys.starts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.bin", ("a", "bin")),
        ("d.x/a.b.json.gz", ("d.x/a", "b.json.gz")),
        ("nodot", None),
        (".hidden", None),
        ("__meta__/a.json", None),
        ("__meta__", None),
        ("__a.bin", ("__a", "bin")),
    ],
)
def test_key_and_suffix(name: str, expected: tuple[str, str] | None) -> None:
    assert key_and_suffix(name) == expected


def test_names_in_extension_headers_are_counted() -> None:
    members = [("a.bin", b"1"), ("b" * 120 + ".bin", b"2")]
    for name, tar_format in FORMATS.items():
        if name != "ustar":
            keys = read_keys(io.BytesIO(tar_bytes(members, tar_format)))
            assert (keys.num_extended, keys.longest_name) == (1, 124)


def test_sparse_files_are_refused() -> None:
    content = tar_bytes([("a.bin", b"1")])
    header = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict")
    header.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(ValueError, match=r"'a.bin' at byte 512 is a sparse file"):
        list(walk_tar(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + content[512:])))


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_truncated_archive_is_an_error(data: st.DataObject) -> None:
    content = tar_bytes([(f"{number}.bin", bytes(number * 300)) for number in range(4)])
    end = with_tarfile(content)[-1][1] + 1024
    cut = data.draw(st.integers(0, end + 511))
    for headers_only in (False, True):
        with pytest.raises(ValueError, match=r"the archive is damaged or ends early|unexpected end of data"):
            list(walk_tar(io.BytesIO(content[:cut]), headers_only=headers_only))


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_changed_byte_is_an_error_or_changes_content_alone(data: st.DataObject) -> None:
    content = bytearray(
        tar_bytes([(f"{number}.bin", bytes(number * 300)) for number in range(4)], data.draw(st.sampled_from(list(FORMATS.values()))))
    )
    expected = [(name, offset, len(value)) for name, offset, value, _ in with_tarfile(bytes(content))]
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        found = [(member.name, member.offset, member.num_bytes) for member in walk_tar(io.BytesIO(bytes(content)))]
    except ValueError as error:
        assert "damaged" in str(error) or "unexpected end" in str(error) or "sparse" in str(error)
    else:
        assert found == expected


def with_size(size: bytes, more: bytes = b"") -> bytes:
    """A tar of one member whose header says ``size`` and has the right checksum."""
    header = bytearray(tar_bytes([("a.bin", b"1")])[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + more + bytes(2048)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_size(b"-0000000100\0"), r"member 'a.bin' at byte 512 has -64 bytes"),
        (with_size(b"\xff" * 12), r"member 'a.bin' at byte 512 has \d+ bytes"),
        (
            with_size(b"\x80" + bytes(5) + b"\x10" + bytes(5)),
            r"unexpected end of data: member 'a.bin' at byte 512 has 17592186044416 bytes",
        ),
        (with_size(b"hello\0\0\0\0\0\0\0"), "no tar header at byte 0"),
        (
            tar_bytes([("a.bin", b"1" * 600), ("b.bin", b"2")])[:600],
            "unexpected end of data: member 'a.bin' at byte 512 has 600 bytes, 88 are there",
        ),
    ],
)
def test_sizes_that_cannot_be_are_errors_and_take_no_memory(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(walk_tar(io.BytesIO(content)))


@pytest.mark.parametrize("record", [b"9 size=-5\n", b"99 path=x\n", b"path=x\n"])
def test_damaged_extension_headers_are_errors(record: bytes) -> None:
    content = bytearray(tar_bytes([("ä" * 9, b"1")], tarfile.PAX_FORMAT))
    content[512:1024] = record.ljust(512, b"\0")
    content[124:136] = b"%011o\0" % len(record)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    for headers_only in (False, True):
        with pytest.raises(ValueError, match="the archive is damaged"):
            list(walk_tar(io.BytesIO(bytes(content)), headers_only=headers_only))


def test_large_members_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_READ_BYTES", 700)
    content = tar_bytes([("a.bin", bytes(range(250)) * 10), ("b.bin", b"2")])
    assert [(member.name, member.offset, member.content, member.start) for member in walk_tar(io.BytesIO(content))] == with_tarfile(content)
