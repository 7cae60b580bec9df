"""DCLM's quality filter: a fastText classifier that tells good web text from ordinary text.

DCLM-baseline keeps the documents to which the classifier ``fasttext-oh-eli5`` gives a probability of at least 0.018112 of
being of high quality, the upper tenth of its RefinedWeb reproduction (Li et al. 2024, arXiv 2406.11794; the repository
mlfoundations/dclm, ``baselines/mappers/enrichers/quality_prediction_enrichers_calc_fasttext.py`` and
``baselines/baselines_configs/fasttext_filter.yaml``). Scores here are the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.utils.files import sha256_file

DEFAULT_LABEL = "__label__hq"


class QualityFilter:
    """Scores documents and says which are good enough. Picklable; the model is loaded where it is first used.

    Args:
        model_path: of a fastText model (``.bin``) with two labels.
        label: that of good documents.
        threshold: documents that score less are rejected.
        top_fraction: instead, the share of documents to keep; the threshold comes of all scores.

    Raises:
        UserError: there is no such file, not exactly one of ``threshold`` and ``top_fraction`` is given, or it is out of
            range.
    """

    def __init__(
        self, model_path: str, label: str = DEFAULT_LABEL, threshold: float | None = None, top_fraction: float | None = None
    ) -> None:
        if (threshold is None) == (top_fraction is None):
            raise UserError("the quality filter needs either a threshold or the top fraction to keep, not both")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"the quality threshold is a probability, from 0 to 1, not {threshold}")
        if top_fraction is not None and not 0 < top_fraction <= 1:
            raise UserError(f"the top fraction to keep is above 0 and at most 1, not {top_fraction}")
        if not Path(model_path).is_file():
            raise UserError(f"there is no fastText model at {model_path}; give the path of a local .bin file")
        self.model_path = model_path
        self.label = label
        self.threshold = threshold
        self.top_fraction = top_fraction

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the model file."""
        return sha256_file(Path(self.model_path))

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Probability that each text is good, float64 [num_texts]. It depends on the text alone, not on its neighbours.

        A text of which the model knows nothing scores 0.

        Raises:
            UserError: fasttext is not installed, or the file is not a model with two labels, one of them ``label``.
        """
        model = _load(self.model_path, self.label)
        # The list form, as the one for single texts does not work with NumPy 2 in the original fasttext package.
        labels, probabilities = model.predict([" ".join(text.strip().splitlines()) for text in texts]) if texts else ([], [])
        scores = np.zeros(len(texts))
        for number, (best, probability) in enumerate(zip(labels, probabilities, strict=True)):
            if len(best):
                scores[number] = probability[0] if best[0] == self.label else 1 - probability[0]
        return scores


@functools.lru_cache(maxsize=1)
def _load(model_path: str, label: str) -> Any:
    """A fastText model, once per process: models of gigabytes are common."""
    try:
        import fasttext
    except ImportError as error:
        raise UserError(f"the quality filter needs fastText ({error}); run: pip install fasttext-numpy2-wheel") from error
    try:
        model = fasttext.load_model(model_path)
        labels = model.get_labels()
    except ValueError as error:
        raise UserError(f"{model_path} is not a fastText model: {error}") from error
    if len(labels) != 2 or label not in labels:
        raise UserError(f"{model_path} has the labels {', '.join(labels[:5])}; the quality filter needs two, one of them {label}")
    return model
