"""The selection of a round from embeddings on disk: by any method, on one rank or several, at once or after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_groupmates.config import RunPaths, UserError
from megatron_groupmates.influence.relation import Relation
from megatron_groupmates.selection import merge
from megatron_groupmates.selection.select import Kinds, select_rows
from megatron_groupmates.selection.store import write_part
from megatron_groupmates.server import grouping, selecting
from megatron_groupmates.server.context import RoundContext
from megatron_groupmates.server.selecting import select_generation
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import SEQUENCE_LENGTH, make_pools, open_groups, tiny_config
from tests.server.oracle_rounds import open_context

AVAILABLE = np.flatnonzero(np.arange(144) % 7 > 0)
RELATION = Relation(alpha=0.9, tau=0.8)
DIM = 6


def embedded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings float16 and influences of the available rows, and embeddings of reference examples."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((len(AVAILABLE), DIM))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings.astype(np.float16), np.round(rng.standard_normal(len(AVAILABLE)), 1), rng.standard_normal((3, DIM)).astype(np.float32)


def run(config: Any, groups: Any) -> tuple[RoundContext, dict[str, Any]]:
    """Select in round 1 of ``config``. Collective."""
    context = open_context(config, groups)
    embeddings, individual, reference = embedded()
    method = config.selection.method
    if groups.is_main and method != "random":
        for first in (0, 50):
            part = slice(first, 50 if not first else None)
            write_part(context.directory / "embeddings", first, embeddings[part], individual[part])
    groups.barrier()
    relation = RELATION if method in ("group", "individual") else None
    return context, select_generation(context, AVAILABLE, relation, None if method == "random" else reference)


def run_small(rank: int, world_size: int, configs: list[Any]) -> None:
    """Select with chunks of few rows and clusters, sort the offers however few there are, and use as many processes as cores."""
    merge._HEAP_ROWS, merge._FEW_CLUSTERS, merge._SAMPLED = 0, 2, (2, 3)
    grouping._ASSIGN_ROWS, selecting._SIMILARITY_CHUNK_ROWS, grouping._PROCESSES_FROM_ROWS = 16, 16, 0
    for config in configs:
        run(config, open_groups(config.server.tensor_model_parallel_size))


def kept(config: Any) -> dict[str, np.ndarray]:
    with np.load(RunPaths.of(config).round(1) / "selection.npz") as content:
        return {key: content[key] for key in content.files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pools")
    make_pools(root)
    return root


def make_config(root: Path, run: Path, **changes: Any) -> Any:
    return tiny_config(root, run__output_dir=str(run), selection__num_clusters=9, **changes)


def in_memory(context: RoundContext, method: str) -> Any:
    """The same selection from arrays."""
    embeddings, individual, _ = embedded()
    pool, lengths = context.pool, context.pool.lengths[AVAILABLE].astype(np.int64)
    return select_rows(
        method,
        lengths=lengths,
        candidates=np.ones(len(AVAILABLE), bool),
        budget_tokens=int(lengths.sum()) // 2,
        seed=context.seed("selection"),
        recipe=context.recipe.selection,
        embeddings=embeddings,
        individual=individual,
        relation=RELATION,
        kinds=Kinds(kind_of=pool.kind_of[AVAILABLE], names=pool.kinds),
    )


class TestOneRank:
    @pytest.mark.parametrize("share", ["equal", "global"])
    @pytest.mark.parametrize("minimum", [None, {"book": 0.6}])
    def test_group_equals_the_selection_in_memory(self, root, groups, tmp_path, share, minimum):
        config = make_config(root, tmp_path / "run", selection__share_per_cluster=share, selection__minimum_source_share=minimum)
        context, report = run(config, groups)
        expected, found = in_memory(context, "group"), kept(config)
        np.testing.assert_array_equal(found["rows"], AVAILABLE[expected.rows])
        np.testing.assert_array_equal(found["first_rows"], AVAILABLE[expected.order])
        np.testing.assert_array_equal(found["first_scores"], expected.scores)
        assert report["counts"] == expected.report and json.loads(json.dumps(report)) == report
        assert sum(report["counts"]["cluster_sizes"]) == len(AVAILABLE)
        if minimum:
            [fact] = report["counts"]["minimum_source_share"]
            assert fact["reserved"] and fact["minimum_tokens"] - SEQUENCE_LENGTH - 1 < fact["selected_tokens"] <= fact["minimum_tokens"]

    def test_all_methods_are_compared(self, root, groups, tmp_path):
        context, report = run(make_config(root, tmp_path / "run"), groups)
        assert set(report["overlap"]["share"]) == {"group", "individual", "random", "similarity"}
        stage = context.stage_costs()["selection"]
        assert stage["overlap"] == report["overlap"]["share"]["group"]
        for name in ("individual", "random"):
            expected = len(np.intersect1d(in_memory(context, name).rows, in_memory(context, "group").rows)) / report["counts"]["selected"]
            assert stage["overlap"][name] == expected
        assert {"centroids", "clusters", "sorted", "similarity", "selection"} <= context.stage_costs().keys()

    def test_examples_are_the_first_chosen_and_the_worst_left(self, root, groups, tmp_path):
        config = make_config(root, tmp_path / "run")
        _, report = run(config, groups)
        found, (_, individual, _) = kept(config), embedded()
        examples = report["examples"]
        assert [document["row"] for document in examples["chosen"]] == found["first_rows"][:10].tolist()
        assert [document["score"] for document in examples["chosen"]] == found["first_scores"][:10].tolist()
        left = ~np.isin(AVAILABLE, found["rows"])
        assert [document["score"] for document in examples["rejected"]] == sorted(individual[left], reverse=True)[:10]

    def test_individual_similarity_and_random(self, root, groups, tmp_path):
        config = make_config(root, tmp_path / "individual", selection__method="individual")
        context, report = run(config, groups)
        np.testing.assert_array_equal(kept(config)["rows"], AVAILABLE[in_memory(context, "individual").rows])
        assert set(report["overlap"]["share"]) == {"group", "individual", "random", "similarity"}

        config = make_config(root, tmp_path / "similarity", selection__method="similarity")
        _, report = run(config, groups)
        embeddings, _, reference = (array.astype(np.float64) for array in embedded())
        mean, std = embeddings.mean(0), embeddings.std(0)
        rows, reference = (embeddings - mean) / std, (reference - mean) / std
        cosines = rows @ reference.T / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(reference, axis=1)
        best = np.sort(np.argsort(-cosines.mean(axis=1))[: report["counts"]["selected"]])
        np.testing.assert_array_equal(kept(config)["rows"], AVAILABLE[best])
        np.testing.assert_allclose(-kept(config)["first_scores"], np.sort(cosines.mean(axis=1))[::-1][: len(best)], rtol=1e-3)
        assert set(report["overlap"]["share"]) == {"random", "similarity"} and "influence_histogram" not in report

        config = make_config(root, tmp_path / "random", selection__method="random")
        context, report = run(config, groups)
        np.testing.assert_array_equal(kept(config)["rows"], AVAILABLE[in_memory(context, "random").rows])
        assert "overlap" not in report and "first_scores" not in kept(config)
        assert set(context.stage_costs()) == {"selection"}

    def test_an_unknown_kind_is_named(self, root, groups, tmp_path):
        config = make_config(root, tmp_path / "run", selection__minimum_source_share={"books": 0.1})
        with pytest.raises(
            UserError, match=r"selection\.minimum_source_share: the pool has no kind of source 'books'; did you mean book\?"
        ):
            run(config, groups)


@pytest.mark.parametrize("share", ["equal", "global"])
def test_a_killed_selection_goes_on_and_ends_the_same(root, groups, tmp_path, share, monkeypatch):
    for module, name, value in (
        (merge, "_HEAP_ROWS", 0),
        (merge, "_FEW_CLUSTERS", 2),
        (merge, "_SAMPLED", (2, 3)),
        (grouping, "_ASSIGN_ROWS", 16),
    ):
        monkeypatch.setattr(module, name, value)
    config = make_config(root, tmp_path / "run", selection__share_per_cluster=share)
    context, report = run(config, groups)
    before = kept(config)
    stages = {"equal": ["group_1_offers"], "global": ["group_1_sample", "group_1_offers_1"]}[share]
    assert set(stages) <= context.stage_costs().keys()
    for lost in ("clusters", stages[-1]):
        (context.directory / "selection.npz").unlink()
        (context.directory / f"{lost}.npz").unlink()
        chunks = sorted((context.directory / lost).glob("*.npz"))
        assert len(chunks) > 3
        chunks[1].unlink()
        stamps = {path: path.stat().st_mtime_ns for path in context.directory.rglob("*") if path.is_file()}
        _, found = run(config, groups)
        assert found == report
        for key, values in before.items():
            np.testing.assert_array_equal(kept(config)[key], values)
        untouched = [chunks[0], chunks[2], context.directory / "centroids.npz", context.directory / "sorted" / "embeddings.npy"]
        assert all(path.stat().st_mtime_ns == stamps[path] for path in untouched), "computed once"
        assert chunks[1].exists()


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_two_ranks_select_what_one_does(root, groups, tmp_path, tensor_size):
    """And chunks, and whether offers are sorted or merged by a heap, do not show either."""
    configs = [
        [
            make_config(
                root,
                tmp_path / f"{share}-{world_size}",
                selection__share_per_cluster=share,
                selection__minimum_source_share={"book": 0.5},
                server__tensor_model_parallel_size=tensor_size,
            )
            for share in ("equal", "global")
        ]
        for world_size in (1, 2)
    ]
    run_ranks(run_small, 2, configs[1], tmp_path=tmp_path)
    for alone, together in zip(*configs, strict=True):
        run(alone, groups)
        for key, values in kept(alone).items():
            np.testing.assert_array_equal(kept(together)[key], values)


def fail_once(rank: int, world_size: int, config: Any) -> str:
    """A chunk that the computing rank of a tensor-parallel group cannot make."""
    context = open_context(config, open_groups(2))

    def compute(first: int, stop: int, done: Any) -> dict[str, np.ndarray]:
        raise UserError(f"the disk of rank {rank} is full")

    with pytest.raises(UserError) as caught:
        grouping.once(context, compute)(0, 1, lambda count: None)
    return str(caught.value)


def test_a_failure_of_the_rank_that_computes_is_that_of_its_group(root, tmp_path):
    config = make_config(root, tmp_path / "run", server__tensor_model_parallel_size=2)
    assert run_ranks(fail_once, 2, config, tmp_path=tmp_path) == ["the disk of rank 0 is full"] * 2
