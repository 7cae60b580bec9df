"""Names of a round's stages, as files have them, put together and put into words. Pure."""

from __future__ import annotations

import re

_BATCH_MARK = ".batch-"
_CLUSTER_STAGE = re.compile(r"group_\d+_(\w+)")
_WORDS = {
    "load_checkpoint": "loading the checkpoint",
    "candidates": "encoding the candidates",
    "reference": "encoding the reference examples",
    "init": "initial fit",
    "final": "final fit",
    "bootstrap": "drawing bootstrap rollouts",
    "embeddings": "embedding the pool",
    "centroids": "finding clusters",
    "clusters": "assigning samples to clusters",
    "sorted": "sorting embeddings by cluster",
    "group": "choosing within clusters",
    "similarity": "scoring similarity to the reference",
}


def stage_family(stage: str) -> str:
    """One name for stages that do the same: the batches of an adaptive budget, and the passes of a choice within clusters."""
    return "group" if _CLUSTER_STAGE.fullmatch(stage) else stage.partition(_BATCH_MARK)[0]


def stage_text(stage: str) -> str:
    """A stage's name for people; batches, numbered from 0 in files, count from 1."""
    if pass_of_group := _CLUSTER_STAGE.fullmatch(stage):
        return f"{_WORDS['group']}, {pass_of_group[1].replace('_', ' ')}"
    name, *details = re.sub(r"\.batch-(\d+)", lambda match: f".batch {int(match[1]) + 1}", stage).split(".")
    return ", ".join([_WORDS.get(name, name.replace("_", " ")), *details])
