"""The most promising candidates of one greedy selection, out of which blocks are formed."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_groupmates.selection.greedy_block import Block, End, Steps
from megatron_groupmates.selection.greedy_state import Fence, GreedyState, length

_LARGEST_POOL = 512
_SMALLEST_BLOCK = 80
_LARGEST_BLOCK = 256
_SHORTEST_PAUSE, _LONGEST_PAUSE = 4, 16


class Pool:
    """Forms blocks, and learns from how they end how large they should be and how far their fences should reach.

    A pass over all samples fills the pool; a pass over the pool finds the candidates of the next block.
    """

    def __init__(self, state: GreedyState) -> None:
        self.state = state
        self.fence: Fence | None = None
        scale = float(state.norms.max(initial=0.0))
        self.pool_reach = 1.5 * scale
        # Times the number of taken samples, as the mean moves ever more slowly.
        self.block_stretch = 2.0 * scale
        self.block_size = _SMALLEST_BLOCK
        # Samples to take one by one before a block is tried again, now and after the next block that serves next to none.
        self.patience, self.pause = 0, _SHORTEST_PAUSE

    def run(self, most: int) -> Steps:
        """Take at most ``most`` samples, by one block; none where the bounds cannot tell which is the best."""
        mean = self.state.mean()
        if self.patience:
            self.patience -= 1
            steps = self._one(mean)
            if len(steps.indices):
                return steps
        moved = length(mean - self.fence.mean) if self.fence else 0.0
        fresh = self.fence is None or moved >= self.fence.reach or not self.state.available[self.candidates].any()
        if fresh:
            moved = 0.0
            self._fill(mean)
        assert self.fence is not None
        candidates, threshold = self._choose(mean)
        fence = Fence(mean, min(self._block_reach(), self.fence.reach - moved), min(threshold, self.fence.threshold))
        reach = self._block_reach()
        steps = Block(self.state, candidates, self.rows[np.searchsorted(self.candidates, candidates)]).run(most, fence)
        self._learn(steps, moved, fence, reach)
        if len(steps.indices):
            return steps
        one = self._one(mean)
        if len(one.indices) or fresh:
            return one
        self.fence = None
        return self.run(most)

    def _block_reach(self) -> float:
        return self.block_stretch / self.state.num_taken

    def _one(self, mean: np.ndarray) -> Steps:
        """The best of the pool, by a pass over it; none if one outside may be better."""
        state = self.state
        nothing = Steps(np.empty(0, np.int64), np.empty(0), 0.0, End.THRESHOLD, 0)
        available = state.available[self.candidates]
        if self.fence is None or not available.any() or length(mean - self.fence.mean) > self.fence.reach:
            return nothing
        floor = state.floor_of(self.candidates, self.rows, mean, 0.0)
        floor[~available] = np.inf
        leader = self.candidates[floor.argmin(keepdims=True)]
        _, score = state.best(leader, mean)
        candidate, score = state.best(self.candidates[floor <= score], mean)
        if not score < self.fence.threshold:
            return nothing
        return dataclasses.replace(nothing, indices=np.array([state.add(candidate)]), scores=np.array([score]))

    def _fill(self, mean: np.ndarray) -> None:
        state = self.state
        self.candidates, threshold = np.flatnonzero(state.available), np.inf
        if len(self.candidates) > _LARGEST_POOL + _LARGEST_POOL // 4:
            floor = state.floor(mean, self.pool_reach)
            order = np.argpartition(floor, _LARGEST_POOL)
            self.candidates, threshold = np.sort(order[:_LARGEST_POOL]), float(floor[order[_LARGEST_POOL:]].min())
        self.rows = state.embeddings[self.candidates].astype(state.fast, copy=False)
        self.fence = Fence(mean, self.pool_reach if threshold < np.inf else np.inf, threshold)

    def _choose(self, mean: np.ndarray) -> tuple[np.ndarray, float]:
        """Candidates of the next block, ascending, and what no other of the pool scores below."""
        available = self.state.available[self.candidates]
        assert self.fence is not None
        size = self.block_size
        count = np.count_nonzero(available)
        # The mean of few moves fast: where all there are make one block, nothing outside can catch up.
        early = count <= _LARGEST_POOL and 4 * self.state.num_taken < count and self.fence.threshold == np.inf
        if early or count <= size + size // 4:
            return self.candidates[available], np.inf
        floor = self.state.floor_of(self.candidates, self.rows, mean, self._block_reach())
        floor[~available] = np.inf
        order = np.argpartition(floor, size)
        return self.candidates[np.sort(order[:size])], float(floor[order[size:]].min())

    def _learn(self, steps: Steps, moved: float, fence: Fence, reach: float) -> None:
        """Set sizes and reaches for the next time, and give the pool up where its own fence was what ended the block."""
        assert self.fence is not None
        drift = moved + steps.drift
        served = len(steps.indices)
        if steps.end in (End.THRESHOLD, End.REACH):
            # One that served next to none would not have served many more had it been larger.
            needed = 2.5 * (steps.size - served) if served > 2 else 0.0
            self.block_size = int(np.clip(needed, _SMALLEST_BLOCK, _LARGEST_BLOCK))
            self.patience = self.pause if served <= 2 else 0
            self.pause = min(2 * self.pause, _LONGEST_PAUSE) if served <= 2 else _SHORTEST_PAUSE
        if steps.end is End.REACH:
            if fence.reach < reach:
                self.fence, self.pool_reach = None, 1.5 * self.pool_reach
            else:
                self.block_stretch *= 1.5
        elif steps.end is End.THRESHOLD:
            if fence.threshold == self.fence.threshold:
                self.fence, self.pool_reach = None, max(1.1 * drift, 0.2 * self.pool_reach)
            else:
                self.block_stretch *= max(1.1 * steps.drift / reach, 0.5)
