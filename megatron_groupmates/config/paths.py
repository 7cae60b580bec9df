"""Where everything of a run lies. Pure path arithmetic: trainer, server and commands agree because they all ask here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """Files and directories of the run in ``root``."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """DeepSpeed's save directory."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step, evaluation or event."""
        return self.root / "metrics.jsonl"

    @property
    def skipped_samples(self) -> Path:
        """Append-only: samples that could not be read and were left out."""
        return self.root / "skipped.jsonl"

    @property
    def training_state(self) -> Path:
        """Where the trainer stands: state, step, time and FLOPs so far."""
        return self.root / "training.json"

    @property
    def selection(self) -> Path:
        """Generations, the pointer to the newest and the generation log."""
        return self.root / "selection"

    @property
    def generation_log(self) -> Path:
        """Append-only: which generation serves from which global sample on."""
        return self.selection / "log.jsonl"

    @property
    def server_state(self) -> Path:
        """Where the selection server stands: round, stage, last failure."""
        return self.selection / "server.json"

    @property
    def server_metrics(self) -> Path:
        """One JSON object per finished stage of a selection round: seconds, FLOPs, rates."""
        return self.selection / "rounds" / "metrics.jsonl"

    def round(self, number: int) -> Path:
        """Working state of one selection round."""
        return self.selection / "rounds" / f"round-{number:06d}"

    def round_failure(self, number: int) -> Path:
        """Written when a round has failed for good: nobody needs to wait for its generation."""
        return self.round(number) / "failed.json"
