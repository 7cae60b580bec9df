"""Where everything of a run lies. Pure path arithmetic: trainer, server and commands agree because they all ask here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_groupmates.config.sections import Config


@dataclass(frozen=True)
class RunPaths:
    """Files and directories of the run in ``root``.

    Attributes:
        root: the run directory.
        checkpoints: DeepSpeed's save directory.
        selection: generations, the pointer to the newest and the generation log.
    """

    root: Path
    checkpoints: Path
    selection: Path

    @classmethod
    def of(cls, config: Config, root: Path | None = None) -> RunPaths:
        """The paths of the run that ``config`` describes, in ``root`` where the run directory has moved or been copied since."""
        return cls.recorded(root, config.run.output_dir, config.checkpoint.directory, config.run.selection_dir)

    @classmethod
    def recorded(cls, root: Path | None, output_dir: str, checkpoints: str | None, selection: str | None) -> RunPaths:
        """As :meth:`of`, from the settings alone. What they place in ``output_dir`` lies in ``root``."""
        before = Path(output_dir)
        now = before if root is None else root

        def place(recorded: str | None, name: str) -> Path:
            path = Path(recorded) if recorded else before / name
            return now / path.relative_to(before) if path.is_relative_to(before) else path

        return cls(now, place(checkpoints, "checkpoints"), place(selection, "selection"))

    @classmethod
    def below(cls, root: Path) -> RunPaths:
        """The paths of a run that keeps everything in ``root``."""
        return cls(root, root / "checkpoints", root / "selection")

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.yaml"

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
