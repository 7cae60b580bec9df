"""Exports for Megatron-Energon, read by Energon itself."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_train_dataset, get_val_dataset
from megatron.energon.savable_loader import BasicDataLoader

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.formats.energon import export_energon, token_cooker
from megatron_groupmates.pool.formats.materialize import materialize
from tests.pool.formats.helpers import MASK, MASKS, ROWS_PER_SHARD, foreign_pool, read_json, selected_tokens, snapshot, subset, whole
from tests.pool.helpers import make_pool


class Encoder(DefaultTaskEncoder):
    """Lists of cooked samples."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self.cookers = [Cooker(token_cooker(output))]

    def encode_sample(self, sample: dict) -> dict:
        return sample

    def batch(self, samples: list[dict]) -> dict:
        assert len(samples) == 1
        return samples[0]


def tokens_of(data: Any) -> list[list[int]]:
    # What get_loader gives, but for its collecting garbage all the time: in a process that has loaded as much as this one, that is slow.
    return [sample["tokens"].tolist() for sample in BasicDataLoader(data, gc_collect_every_n_steps=0)]


def read(output: Path, given_path: Path, part: str = "val", num_workers: int = 0) -> list[list[int]]:
    config = WorkerConfig(rank=0, world_size=1, num_workers=num_workers)
    data = get_val_dataset(given_path, split_part=part, worker_config=config, batch_size=1, task_encoder=Encoder(output))
    return tokens_of(data)


@pytest.mark.parametrize("member_format", ["raw", "json.gz"])
@given(mask=MASKS)
@settings(deadline=None, max_examples=4)
def test_exactly_the_selected_samples(tmp_path_factory: pytest.TempPathFactory, member_format: str, mask: np.ndarray) -> None:
    root = tmp_path_factory.mktemp("export")
    chosen = subset(make_pool(root / "pool", ROWS_PER_SHARD, member_format=member_format), mask)
    before = snapshot(root / "pool")
    export_energon(chosen, root / "out")
    assert read(root / "out", root / "out" / "metadataset.yaml") == selected_tokens(chosen)
    assert read(root / "out", root / "out", "train") == selected_tokens(chosen)
    assert snapshot(root / "pool") == before


def test_training_and_workers(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK)
    export_energon(chosen, tmp_path / "out")
    expected = sorted(selected_tokens(chosen))
    assert sorted(read(tmp_path / "out", tmp_path / "out" / "metadataset.yaml", num_workers=2)) == expected
    seen = []
    for rank in range(2):
        config = WorkerConfig(rank=rank, world_size=2, num_workers=0)
        data = get_train_dataset(
            tmp_path / "out" / "metadataset.yaml",
            worker_config=config,
            batch_size=1,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            repeat=False,
            task_encoder=Encoder(tmp_path / "out"),
        )
        seen += tokens_of(data)
    assert sorted(seen) == expected


def test_the_metadata_is_what_energon_would_make(tmp_path: Path) -> None:
    from megatron.energon.flavors import CrudeWebdataset

    names = [[f"{row}{ending}" for row in range(3) for ending in (".json", ".json.gz")] for _ in range(2)]
    index = foreign_pool(tmp_path / "pool", names, tar_format=tarfile.PAX_FORMAT)
    export_energon(whole(index), tmp_path / "out")
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.idx")}
    paths = [path.name for path in sorted((tmp_path / "out").glob("*.tar"))]
    # One process: two samples of different shards have one key here, which only its random-access index minds.
    (tmp_path / "again").mkdir()
    for name in paths[:1]:
        (tmp_path / "again" / name).write_bytes((tmp_path / "out" / name).read_bytes())
        CrudeWebdataset.prepare_dataset(tmp_path / "again", [name], split_parts_ratio=[("train", 1.0)], workers=1)
        assert (tmp_path / "again" / f"{name}.idx").read_bytes() == ours[f"{name}.idx"]
        counts = read_json(tmp_path / "out" / ".nv-meta" / ".info.json")["shard_counts"]
        assert read_json(tmp_path / "again" / ".nv-meta" / ".info.json")["shard_counts"] == {name: counts[name]}


def test_samples_that_the_pool_has_not_are_left_out(tmp_path: Path) -> None:
    chosen = whole(foreign_pool(tmp_path / "pool", [["0.json.gz", "between.json", "1.json.gz", "1.txt"]]))
    export_energon(chosen, tmp_path / "out")
    assert read(tmp_path / "out", tmp_path / "out" / "metadataset.yaml") == selected_tokens(chosen)


def test_any_selection_materialised(tmp_path: Path) -> None:
    chosen = subset(make_pool(tmp_path / "pool", ROWS_PER_SHARD), MASK)
    export_energon(whole(materialize(chosen, tmp_path / "out", "raw", rows_per_shard=2)), tmp_path / "out", max_excludes=0)
    assert read_json(tmp_path / "out" / "export.json")["num_excludes"] == 0
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert read(moved, moved / "metadataset.yaml") == selected_tokens(chosen)


def test_what_energon_cannot_leave_out_is_refused(tmp_path: Path) -> None:
    index = make_pool(tmp_path / "pool", ROWS_PER_SHARD)
    export_energon(subset(index, MASK), tmp_path / "enough", max_excludes=11)
    with pytest.raises(UserError, match=r"11 samples would have to be left out one by one, more than --max-excludes 10: .*--materialize"):
        export_energon(subset(index, MASK), tmp_path / "out", max_excludes=10)
    twice = foreign_pool(tmp_path / "twice", [["0.json.gz", "1.json.gz", "0.json.gz"]])
    with pytest.raises(UserError, match=r"0.tar has the key '0' twice: Energon leaves out both or none; export with --materialize"):
        export_energon(subset(twice, np.array([True, True, False])), tmp_path / "out1")
    braces = foreign_pool(tmp_path / "braces", [["0.json.gz", "{1,2}.json.gz"]])
    with pytest.raises(UserError, match=r"Energon would expand the braces in '0.tar/\{1,2\}'; export with --materialize"):
        export_energon(subset(braces, np.array([True, False])), tmp_path / "out2")


def test_the_cooker(tmp_path: Path) -> None:
    export_energon(whole(make_pool(tmp_path / "pool", (2,))), tmp_path / "out")
    cooker = pickle.loads(pickle.dumps(token_cooker(tmp_path / "out")))
    assert cooker.__stateless__
    cooked = cooker({"__key__": "k", "__restore_key__": (1,), "json": {}, "bin": np.array([3, 4], dtype="<u2").tobytes()})
    assert cooked["tokens"].tolist() == [3, 4] and (cooked["__key__"], cooked["__restore_key__"]) == ("k", (1,))
    assert set(cooked) == {"__key__", "__restore_key__", "tokens"}
    with pytest.raises(ValueError, match=r"sample 'k' has no member \.bin, only __key__, txt"):
        cooker({"__key__": "k", "txt": b"x"})
    with pytest.raises(UserError, match="is not an export"):
        token_cooker(tmp_path / "pool")
