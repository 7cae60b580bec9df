"""Which steps start a selection round: one rule for the trainer that saves there and the server that waits for them."""

from __future__ import annotations

from megatron_groupmates.config.sections import Config


def refresh_number(config: Config, step: int) -> int | None:
    """Number of the round (from 1) that the checkpoint of ``step`` starts, None when it starts none.

    A refresh at the last step would never be trained on, so there is none.
    """
    selection = config.selection
    since = step - selection.first_refresh_step
    if not selection.enabled or since < 0 or since % selection.refresh_interval or step >= config.training.train_iters:
        return None
    number = since // selection.refresh_interval + 1
    return number if selection.max_refreshes is None or number <= selection.max_refreshes else None


def refresh_steps(config: Config) -> list[int]:
    """Steps of all planned refreshes, ascending."""
    selection = config.selection
    steps = range(selection.first_refresh_step, config.training.train_iters, selection.refresh_interval)
    return [step for step in steps if refresh_number(config, step) is not None]
