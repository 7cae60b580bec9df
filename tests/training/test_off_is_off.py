"""With selection off, the selection code is neither imported nor felt."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.common.distributed import run_ranks
from tests.training.runs import Job, losses, make_config, train_in_rank, train_jobs

BLOCKED = (
    "megatron_groupmates.selection",
    "megatron_groupmates.influence",
    "megatron_groupmates.server",
    "megatron_groupmates.training.adoption",
)


class _Blocker:
    """An import hook that makes the selection code unimportable."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(BLOCKED):
            raise ImportError(f"{name} is blocked by the test")
        return None


def _train_without_selection_code(rank, world_size, config):
    sys.meta_path.insert(0, _Blocker())
    outcome = train_in_rank(rank, world_size, Job(config=config))
    return outcome, sorted(name for name in sys.modules if name.startswith(BLOCKED))


def test_losses_are_bitwise_those_of_a_run_without_the_selection_code(tmp_path: Path):
    off = make_config(tmp_path, "parallel.tensor_model_parallel_size=2", run="off")
    waiting = make_config(
        tmp_path, "parallel.tensor_model_parallel_size=2", "selection.enabled=true", "selection.poll_interval_steps=1", run="waiting"
    )
    assert run_ranks(_train_without_selection_code, 2, off, tmp_path=tmp_path) == [("finished", [])] * 2
    run_ranks(train_jobs, 2, [Job(config=waiting)], tmp_path=tmp_path)
    assert losses(off) == losses(waiting) and len(losses(off)) == 12
    assert not (Path(off.run.output_dir) / "selection").exists()
