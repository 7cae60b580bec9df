"""Pools in a real S3 server on loopback: the same samples as from disk, a bounded cache, outages."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool import reader as reader_module
from megatron_groupmates.pool import remote as remote_module
from megatron_groupmates.pool import remote_cache
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.reader import DamagedSample, PoolReader
from megatron_groupmates.pool.remote import RemoteSettings
from megatron_groupmates.pool.sources import read_sources
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.utils.storage import configure_storage, filesystem, upload
from tests.common.s3 import BUCKET, s3_options  # noqa: F401
from tests.pool.helpers import make_pool, tiny_tokenizer

URL = f"s3://{BUCKET}/pools/one"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_RETRY_SECONDS", (0.0,) * 3)


def put(directory: Path, url: str = URL) -> None:
    """Copy a pool to the store."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            upload(path, f"{url}/{path.relative_to(directory).as_posix()}")


@pytest.fixture
def local(tmp_path: Path, s3_options: dict[str, Any]) -> PoolIndex:  # noqa: F811
    """A pool on disk that is also at ``URL``."""
    index = make_pool(tmp_path / "pool", (30, 20, 25), length=600)
    put(tmp_path / "pool")
    return index


def settings(tmp_path: Path, cache_bytes: int = 1 << 30) -> RemoteSettings:
    return RemoteSettings(str(tmp_path / "cache"), cache_bytes)


class Requests:
    """What is fetched by range while it is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self._read_ranges = remote_module.read_ranges
        monkeypatch.setattr(remote_module, "read_ranges", self)

    def __call__(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        self.ranges += ranges
        return self._read_ranges(ranges)

    def taken(self) -> list[tuple[str, int, int]]:
        """The ranges since the last call."""
        taken, self.ranges = self.ranges, []
        return taken


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30, 1 << 16])
@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
def test_a_remote_pool_reads_as_the_local_one(
    tmp_path: Path,
    s3_options: dict[str, Any],  # noqa: F811
    cache_bytes: int,
    member_format: str,
) -> None:
    local = make_pool(tmp_path / "pool", (30, 20, 25), length=600, member_format=member_format)
    put(tmp_path / "pool")
    index = PoolIndex.open(URL + "/", remote=settings(tmp_path, cache_bytes))
    assert index.fingerprint == local.fingerprint and index.directory == URL
    assert index.shard_path(1) == f"{URL}/shard_00000001.tar"
    assert PoolTokenizer.of_pool(index).fingerprint == tiny_tokenizer().fingerprint
    expected, reader, order = PoolReader(local).read_batch(range(75)), PoolReader(index), np.random.default_rng(0).permutation(75)
    for _ in range(2):
        batches = [reader.read_batch(order[first : first + 6]) for first in range(0, 75, 6)]
        assert np.array_equal(np.concatenate(batches), expected[order])
        assert np.array_equal(reader.read_batch(range(75)), expected)
    assert np.array_equal(reader.read_many([3, 70])[1], expected[70])


def test_random_reads_fetch_their_own_bytes_and_scans_large_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex
) -> None:
    monkeypatch.setattr(remote_module, "_MAX_GAP_BYTES", 4000)
    reader, requests = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path))), Requests(monkeypatch)
    reader.read_batch([40, 3, 12])
    start = [int(local.offsets[row]) for row in (3, 12, 40)]
    shards = ["0", "0", "1"]
    assert requests.taken() == [
        (f"{URL}/shard_0000000{shard}.tar", first, first + 1200) for shard, first in zip(shards, start, strict=True)
    ]
    reader.read_batch([3, 40])
    assert requests.taken() == []
    reader.read_batch(range(2, 75))
    assert len(requests.taken()) == 3
    monkeypatch.setattr(remote_module, "_MAX_RANGE_BYTES", 10_000)
    PoolReader(PoolIndex.open(URL, remote=settings(tmp_path, 0))).read_batch(range(30))
    assert [stop - start for _, start, stop in requests.taken()] == [9392] * 6


def test_the_index_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex) -> None:
    opened = []
    open_input = remote_module.open_input
    monkeypatch.setattr(remote_module, "open_input", lambda url: opened.append(url) or open_input(url))
    for _ in range(2):
        index = PoolIndex.open(URL, remote=settings(tmp_path))
        assert opened == [f"{URL}/index.bin", f"{URL}/tokenizer.json"]
    copy = Path(index.file_path("index.bin"))
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + b"\xff")
    assert PoolIndex.open(URL, remote=settings(tmp_path)).fingerprint == local.fingerprint
    assert copy.read_bytes() == content and len(opened) == 3
    assert index.file_path("shard_00000000.meta.jsonl.zst") == f"{URL}/shard_00000000.meta.jsonl.zst"
    assert list(read_sources(index, "shard_00000000")) == []


def test_what_is_wrong_with_a_remote_pool_is_said(tmp_path: Path, local: PoolIndex) -> None:
    system, inner = filesystem(URL)
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/nowhere is not a pool: it has no pool.json"):
        PoolIndex.open(f"s3://{BUCKET}/nowhere", remote=settings(tmp_path))
    system.rm(f"{inner}/shard_00000001.tar")
    system.pipe(f"{inner}/shard_00000002.tar", b"abc")
    with pytest.raises(UserError) as caught:
        PoolIndex.open(URL, remote=settings(tmp_path))
    assert f"pool {URL}: 1 of 3 shards are missing in {URL}: shard_00000001.tar; 1 shards in {URL} have another size: " in str(caught.value)
    system.pipe(f"{inner}/index.bin", b"abc")
    with pytest.raises(
        UserError, match=rf"pool {URL}: index.bin is not the one the pool was made with \(SHA-256 [0-9a-f]+, pool.json says"
    ):
        PoolIndex.open(URL, remote=RemoteSettings(str(tmp_path / "other")))
    system.rm(f"{inner}/index.bin")
    with pytest.raises(UserError, match=r"index.bin is not the one .* \(SHA-256 missing"):
        PoolIndex.open(URL, remote=RemoteSettings(str(tmp_path / "other")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep copies of a remote pool in .*; set data.cache_directory"):
        PoolIndex.open(URL, remote=RemoteSettings(str(tmp_path / "file")))


def test_a_store_that_does_not_answer_is_a_clear_error(tmp_path: Path, s3_options: dict[str, Any]) -> None:  # noqa: F811
    patience = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2}}
    configure_storage({"s3": {"key": "test", "secret": "test", "endpoint_url": "http://127.0.0.1:9", **patience}})
    with pytest.raises(
        UserError, match=rf"pool {URL} cannot be opened: .*EndpointConnectionError.*; check the path or URL, and for a store"
    ):
        PoolIndex.open(URL, remote=settings(tmp_path))


def test_shards_may_be_remote_while_the_index_is_local(tmp_path: Path, local: PoolIndex) -> None:
    pool, text = tmp_path / "pool", (tmp_path / "pool/pool.json").read_text()
    (pool / "pool.json").write_text(text.replace('"shard_directory": "."', f'"shard_directory": "{URL}"'))
    expected = PoolReader(local).read_batch(range(75))
    for path in pool.glob("*.tar"):
        path.unlink()
    index = PoolIndex.open(pool, remote=settings(tmp_path))
    assert index.shard_path(0) == f"{URL}/shard_00000000.tar" and index.directory == pool
    assert np.array_equal(PoolReader(index).read_batch(range(75)), expected)


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def test_the_cache_keeps_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex) -> None:
    monkeypatch.setattr(remote_cache, "_TOUCH_SECONDS", 0.0)
    bound = 150_000
    reader, requests = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path, bound))), Requests(monkeypatch)
    expected, generator = PoolReader(local).read_batch(range(75)), np.random.default_rng(0)
    for _ in range(60):
        rows = generator.integers(0, 75, 4)
        assert np.array_equal(reader.read_batch(rows), expected[rows])
        assert disk_bytes(tmp_path / "cache/shards") <= bound + 4096
    assert 0 < len(requests.taken()) < 240


def use_cache(directory: Path, seed: int, bound: int, queue: multiprocessing.Queue) -> None:
    """Read and write members of known content; puts how many were found, or -1 where one was wrong."""
    cache, generator, hits = remote_cache.MemberCache(directory, "pool", np.full(4, 1 << 20), bound), np.random.default_rng(seed), 0
    for _ in range(300):
        places = sorted({(int(shard), 1024 * int(block)) for shard, block in generator.integers(0, (4, 40), (6, 2))})
        shards, starts = [shard for shard, _ in places], [start for _, start in places]
        members = [f"{shard} {start} ".encode() * 60 for shard, start in places]
        found = cache.read(shards, starts, [len(member) for member in members])
        if any(kept not in (None, member) for kept, member in zip(found, members, strict=True)):
            queue.put(-1)
            return
        hits += sum(kept is not None for kept in found)
        cache.write(shards, starts, members)
    queue.put(hits)


def test_processes_may_use_the_cache_at_the_same_time(tmp_path: Path) -> None:
    context, bound = multiprocessing.get_context("fork"), 250_000
    queue = context.Queue()
    processes = [context.Process(target=use_cache, args=(tmp_path, seed, bound, queue)) for seed in range(3)]
    for process in processes:
        process.start()
    assert min(queue.get(timeout=500) for _ in processes) > 0
    for process in processes:
        process.join()
    assert disk_bytes(tmp_path) <= bound + 4096


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex) -> None:
    monkeypatch.setattr(remote_cache, "_TOUCH_SECONDS", 0.0)
    reader, requests = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path, 62_000))), Requests(monkeypatch)
    files = []
    for age, row in enumerate((0, 30, 50)):
        reader.read(row)
        (path,) = set((tmp_path / "cache/shards").glob("*/*")) - set(files)
        files.append(path)
        os.utime(path, (1000 + age, 1000 + age))
    reader.read(0)
    assert len(requests.taken()) == 3
    reader.read_batch([51, 52])
    assert [path.exists() for path in files] == [True, False, True]
    reader.read(0)
    assert len(requests.taken()) == 1


def test_a_damaged_cache_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex) -> None:
    reader, requests = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path))), Requests(monkeypatch)
    expected = PoolReader(local).read_batch(range(75))
    for damage in ("truncate", "empty", "zero", "flip", "directory"):
        reader.read_batch(range(75))
        reader.read_batch(range(75))
        requests.taken()
        for path in (tmp_path / "cache/shards").glob("*/*"):
            content = bytearray(path.read_bytes())
            if damage == "flip":
                content[-1000] ^= 1
            elif damage == "directory":
                path.unlink()
                path.mkdir()
                continue
            size = {"truncate": len(content) // 2, "empty": 0}.get(damage, len(content))
            path.write_bytes(bytes(size) if damage == "zero" else content[:size])
        assert np.array_equal(reader.read_batch(range(75)), expected)
        assert requests.taken()


def test_a_full_disk_ends_keeping_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex, caplog: pytest.LogCaptureFixture
) -> None:
    reader = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path)))
    expected = PoolReader(local).read_batch(range(20))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        assert np.array_equal(reader.read_batch(range(20)), expected)
    assert caplog.text.count("are no longer kept in") == 1 and "No space left on device" in caplog.text


def test_members_that_do_not_decode_are_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex) -> None:
    reader = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path)))
    expected, read_ranges, calls = PoolReader(local).read(7), remote_module.read_ranges, []

    def glitch(ranges: list[tuple[str, int, int]]) -> list[bytes]:
        calls.append(ranges)
        found = read_ranges(ranges)
        return [b"\xff" * len(part) for part in found] if len(calls) == 1 else found

    monkeypatch.setattr(remote_module, "read_ranges", glitch)
    assert np.array_equal(reader.read(7), expected)
    assert np.array_equal(reader.read(7), expected)
    assert len(calls) == 2


def test_an_outage_is_retried_then_reported_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """The server itself goes away and comes back."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patience = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2}}
    configure_storage({"s3": {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}", **patience}})
    reader, expected = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path, 0))), PoolReader(local).read_batch([7, 40])
    assert np.array_equal(reader.read_batch([7, 40]), expected)
    server.stop()
    with pytest.raises(DamagedSample, match=rf"{URL}/shard_00000000.tar, row 7: cannot read .*; check the disk or network") as caught:
        reader.read_batch([7, 40])
    assert (caught.value.row, caught.value.row_in_shard) == (7, 7)
    assert caplog.text.count("; trying again") == 3

    def restart(_: float) -> None:
        nonlocal server
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()

    monkeypatch.setattr(reader_module.time, "sleep", restart)
    try:
        assert np.array_equal(reader.read_batch([7, 40]), expected)
        assert caplog.text.count("; trying again") == 4
    finally:
        server.stop()


class Batches(torch.utils.data.Dataset):
    """Batches of four rows of a pool."""

    def __init__(self, reader: PoolReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return 18

    def __getitem__(self, number: int) -> np.ndarray:
        return self.reader.read_batch(range(4 * number, 4 * number + 4))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read_remote_pools(tmp_path: Path, local: PoolIndex, method: str) -> None:
    """Workers start from a process that has used the store already, and share the cache."""
    reader = PoolReader(PoolIndex.open(URL, remote=settings(tmp_path)))
    expected = PoolReader(local).read_batch(range(72))
    assert np.array_equal(reader.read(0), expected[0])
    loader = torch.utils.data.DataLoader(
        Batches(reader), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=500, persistent_workers=True
    )
    for _ in range(2):
        assert np.array_equal(np.concatenate([batch.numpy() for batch in loader]), expected)
    assert np.array_equal(reader.read(74), PoolReader(local).read(74))


def test_processes_share_the_copies_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: PoolIndex) -> None:
    opened, open_input = [], remote_module.open_input
    monkeypatch.setattr(remote_module, "open_input", lambda url: opened.append(url) or open_input(url))
    with ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(lambda _: PoolIndex.open(URL, remote=settings(tmp_path)), range(4)))
    assert len(opened) == 2
    PoolReader(indices[0]).read_batch(range(75))
    requests = Requests(monkeypatch)
    again = PoolReader(pickle.loads(pickle.dumps(indices[1])))
    assert np.array_equal(again.read_batch(range(75)), PoolReader(local).read_batch(range(75)))
    assert requests.taken() == [] and len(opened) == 2
