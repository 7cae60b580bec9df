"""The passes of a build on one rank: score, scatter, gather, merge; each with waiting for the other ranks."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess.gather import Destination, GatherContext, gather_cell
from megatron_groupmates.pool.preprocess.merge import count_bad, merge_pool, summarise, write_all_rejects
from megatron_groupmates.pool.preprocess.options import BuildOptions
from megatron_groupmates.pool.preprocess.plan import cell_starts, count_shards, deal, duplicates, score_at_rank, shards_of_cell
from megatron_groupmates.pool.preprocess.quality import QualityFilter
from megatron_groupmates.pool.preprocess.ranks import Launch
from megatron_groupmates.pool.preprocess.records import InputFile
from megatron_groupmates.pool.preprocess.scatter import ScatterContext, scatter_file, score_file
from megatron_groupmates.pool.preprocess.work import FileFacts, WorkDirectory, remove_temporaries
from megatron_groupmates.pool.sources import sources_path
from megatron_groupmates.pool.tokenizer import PoolTokenizer
from megatron_groupmates.pool.workers import run_tasks
from megatron_groupmates.pool.writer import shard_name
from megatron_groupmates.utils.files import read_json, write_json
from megatron_groupmates.utils.progress import progress_bar
from megatron_groupmates.utils.storage import find_files

logger = logging.getLogger(__name__)

TOOL = "preprocess_dclm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """One build on one rank.

    Attributes:
        files: the input files, in order.
        num_named_twice: of them, those that were named more than once.
        output: directory or URL of the pool.
        tokenizer: of the pool.
        options: what shapes its content.
        quality: the options' quality filter.
        arguments: all that shapes it, as JSON.
        num_cells: of the shuffle.
        work: where finished work is kept.
        num_workers: processes, 0 for none beside this one.
        max_rejects: documents that may be unusable, None for any number.
        destination: of the pool's files.
        facts: of the input files that are known to be finished, by number.
    """

    files: tuple[InputFile, ...]
    num_named_twice: int
    output: str
    tokenizer: PoolTokenizer
    options: BuildOptions
    quality: QualityFilter | None
    arguments: dict[str, Any]
    num_cells: int
    work: WorkDirectory
    num_workers: int
    max_rejects: int | None
    destination: Destination
    facts: dict[int, FileFacts] = dataclasses.field(default_factory=dict)

    def forget_lost_shards(self) -> None:
        """Make again the shards that are no longer at their place: somebody has removed the output."""
        finished = self.work.finished_shards()
        names = {Path(file.path).name for file in find_files(self.output)} if finished else set()
        for shard in finished:
            name = shard_name(shard)
            if not {f"{name}.tar", sources_path(Path(), name).name} <= names:
                self.work.record_path(shard).unlink()
        if self.destination.directory.is_dir():
            remove_temporaries(self.destination.directory)

    def run(self, launch: Launch) -> dict[str, Any] | None:
        """All passes; the summary on the first rank."""
        all_workers = self.num_workers * launch.world_size
        if launch.rank == 0 and len(self.files) < all_workers:
            logger.info("%d input files for %d workers: a file is read by one worker", len(self.files), all_workers)
        threshold = self._threshold(launch)
        context = ScatterContext(self.work, self.files, self.tokenizer, self.options, self.num_cells, self.quality, threshold)
        self._scatter(launch, context)
        facts = [self.facts[number] for number in range(len(self.files))]
        duplicate_of = duplicates([file.sha256 for file in facts])
        summary = summarise(facts, duplicate_of, self.num_named_twice)
        if launch.rank == 0:
            self._check_rejects(duplicate_of)
        num_shards = self._gather(launch, facts, duplicate_of) if summary["samples"] else 0
        if launch.rank > 0:
            launch.say_finished()
            return None
        if num_shards:
            made_by = {"tool": TOOL, "arguments": self.arguments, "summary": summary}
            merge_pool(self.work, self.destination, facts, duplicate_of, num_shards, self.tokenizer, self.options.member_format, made_by)
        launch.wait_for_finished()
        self.work.remove()
        if not num_shards:
            raise UserError(f"no sample comes of the {len(facts)} input files: {_describe(summary)}; check --text-field, or lower --pack")
        return summary

    def _deal(self, launch: Launch) -> list[int]:
        """Input files of this rank."""
        return deal([file.num_bytes for file in self.files], launch.world_size)[launch.rank]

    def _threshold(self, launch: Launch) -> float | None:
        """Lowest quality score to keep; for a top fraction all documents are scored first."""
        quality, work = self.quality, self.work
        if quality is None or quality.top_fraction is None:
            return None if quality is None else quality.threshold
        context = ScatterContext(work, self.files, self.tokenizer, self.options, self.num_cells, quality)
        if not work.threshold.exists():
            scored = work.scored_files()
            mine = [number for number in self._deal(launch) if number not in scored]
            with _bar(launch, sum(self.files[number].num_bytes for number in mine), "score", "B") as bar:
                run_tasks(score_file, context, mine, min(self.num_workers, len(mine)), on_advance=bar.update, on_done=launch.check)
                launch.wait(lambda: work.threshold.exists() or len(work.scored_files()) == len(self.files))
            if launch.rank == 0:
                write_json(work.threshold, self._score_of_top_fraction(quality.top_fraction))
        launch.wait(work.threshold.exists)
        return read_json(work.threshold)

    def _score_of_top_fraction(self, fraction: float) -> float:
        scores = _StoredScores([self.work.scores_path(number) for number in range(len(self.files))])
        num_scores = sum(map(len, scores))
        return score_at_rank(scores, math.ceil(fraction * num_scores)) if num_scores else 0.0

    def _scatter(self, launch: Launch, context: ScatterContext) -> None:
        """First pass over this rank's files; then wait for the other ranks'."""
        self._read_new_facts()
        mine = [number for number in self._deal(launch) if number not in self.facts]
        sizes = [file.num_bytes for file in self.files]
        with _bar(launch, sum(sizes), "tokenise", "B", initial=sum(sizes[number] for number in self.facts)) as bar:

            def look() -> bool:
                new = self._read_new_facts()
                bar.update(sum(sizes[number] for number in new - set(mine)))
                if new and launch.rank == 0:
                    self._check_rejects([])
                launch.check()
                return len(self.facts) == len(self.files)

            if self.facts and launch.rank == 0:
                self._check_rejects([])
            run_tasks(scatter_file, context, mine, min(self.num_workers, len(mine)), on_advance=bar.update, on_done=look)
            if not look():
                bar.set_postfix_str("waiting for files of other ranks")
                launch.wait(look)

    def _read_new_facts(self) -> set[int]:
        """Take note of the files that have been finished, here or elsewhere. Returns their numbers."""
        new = self.work.finished_files() - self.facts.keys()
        self.facts.update((number, self.work.read_facts(number)) for number in new)
        return new

    def _check_rejects(self, duplicate_of: list[int | None]) -> None:
        """End when too many documents are rejected; ``duplicate_of`` is empty as long as files are missing."""
        if self.max_rejects is None:
            return
        facts = sorted(self.facts.items())
        originals = duplicate_of or [None] * len(facts)
        summary = summarise([file for _, file in facts], originals, 0)
        if count_bad(summary) > self.max_rejects:
            path = self.work.rejects
            write_all_rejects(path, self.work, facts, originals)
            raise UserError(
                f"{count_bad(summary)} documents rejected so far, --max-rejects is {self.max_rejects}; {path} lists them "
                f"({_describe(summary)}). Finished work is kept: the same command with a higher limit continues"
            )

    def _gather(self, launch: Launch, facts: list[FileFacts], duplicate_of: list[int | None]) -> int:
        """Second pass over this rank's cells; on the first rank wait for the others'. Returns the number of shards."""
        work, options = self.work, self.options
        originals = [number for number, original in enumerate(duplicate_of) if original is None]
        spools = tuple(work.open_spool(number, facts[number]) for number in originals)
        starts = cell_starts(sum(spool.samples_per_cell(self.num_cells) for spool in spools))
        context = GatherContext(
            work=work,
            destination=self.destination,
            file_numbers=np.array(originals, dtype=np.int64),
            spools=spools,
            starts=starts,
            seed=options.seed,
            samples_per_shard=options.samples_per_shard,
            dtype=self.tokenizer.token_dtype,
            member_format=options.member_format,
            memory_bytes=2 * options.cell_bytes,
        )
        num_samples, num_shards = int(starts[-1]), count_shards(int(starts[-1]), options.samples_per_shard)
        finished = work.finished_shards()
        shards_of = [shards_of_cell(starts, cell, options.samples_per_shard) for cell in range(self.num_cells)]
        mine = sorted(deal([len(shards) for shards in shards_of], launch.world_size)[launch.rank])
        mine = [cell for cell in mine if not finished.issuperset(shards_of[cell])]
        done = min(len(finished) * options.samples_per_shard, num_samples)
        with _bar(launch, num_samples, "write shards", "sample", initial=done) as bar:
            run_tasks(gather_cell, context, mine, min(self.num_workers, len(mine)), on_advance=bar.update, on_done=launch.check)
            if launch.rank == 0:

                def look() -> bool:
                    num_finished = len(work.finished_shards())
                    bar.update(min(num_finished * options.samples_per_shard, num_samples) - bar.n)
                    return num_finished == num_shards

                if not look():
                    bar.set_postfix_str("waiting for shards of other ranks")
                    launch.wait(look)
        return num_shards


class _StoredScores:
    """Quality scores of all files, one file at a time in memory."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(path, mmap_mode="r") for path in self._paths)


def _bar(launch: Launch, total: int, description: str, unit: str, initial: int = 0) -> Any:
    return progress_bar(total, description, unit=unit, unit_scale=True, initial=initial, enabled=launch.rank == 0)


def _describe(summary: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary["rejects_by_kind"].items())
    return (
        f"{summary['documents_accepted']} documents with {summary['tokens_encoded']} tokens, "
        f"{summary['documents_rejected']} documents rejected{f' ({kinds})' if kinds else ''}"
    )
