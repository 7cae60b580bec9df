"""DCLM's quality filter, with a real fastText model."""

from __future__ import annotations

import builtins
import pickle
import struct
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pytest

from megatron_groupmates.config.errors import UserError
from megatron_groupmates.pool.preprocess import quality
from megatron_groupmates.pool.preprocess.quality import QualityFilter

GOOD = "the theorem follows because every bounded sequence has a convergent part"
BAD = "click here to buy cheap pills now and win a free prize today"
MIXED = ("the free theorem", "every prize follows", "click because", "a sequence to buy", "win", "bounded", "nothing known here xyzzy")


def write_model(directory: Path, labels: tuple[str, ...] = ("__label__hq", "__label__cc")) -> str:
    """A fastText model in its own file format, version 12: words of ``GOOD`` speak for the first label, words of ``BAD`` against it.

    Written out rather than trained: training in the wheel for NumPy 2 reads memory that is not initialised and seldom succeeds.
    """
    words = sorted({*GOOD.split(), *BAD.split()})
    inputs = np.array([[(word in GOOD.split()) - (word in BAD.split()) + 0.05 * n, 0.1 * n] for n, word in enumerate(words)])
    outputs = np.array([[1.0, 0.1], [-1.0, 0.2], [0.0, 0.3]])[: len(labels)]
    supervised = softmax = 3
    #                    dim, ws, epoch, minCount, neg, wordNgrams, loss, model, bucket, minn, maxn, lrUpdateRate, t
    settings = struct.pack("<12id", 2, 5, 5, 1, 5, 1, softmax, supervised, 0, 0, 0, 100, 1e-4)
    entries = [(word, 0) for word in words] + [(label, 1) for label in labels]
    dictionary = struct.pack("<3i2q", len(entries), len(words), len(labels), 1000, -1)
    dictionary += b"".join(text.encode() + b"\0" + struct.pack("<qb", 10, kind) for text, kind in entries)
    matrices = b"".join(struct.pack("<?2q", False, *matrix.shape) + matrix.astype("<f4").tobytes() for matrix in (inputs, outputs))
    path = directory / "model.bin"
    path.write_bytes(struct.pack("<2i", 793712314, 12) + settings + dictionary + matrices)
    return str(path)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


def test_scores_are_dclms(model_path: str) -> None:
    """The probability of the better label, taken from one where that is not the label of good texts."""
    model = fasttext.load_model(model_path)
    texts = [GOOD, BAD, *MIXED, "  the theorem\r\nfollows\n\nbecause\u2028every \n"]
    scores = pickle.loads(pickle.dumps(QualityFilter(model_path, threshold=0.5))).score(texts)
    assert scores.dtype == np.float64
    assert scores[0] > 0.6 > 0.4 > scores[1]
    assert len(set(scores.tolist())) > 7
    for text, score in zip(texts, scores, strict=True):
        [label], [probability] = model.predict(" ".join(text.strip().splitlines()))
        assert score == (probability if label == "__label__hq" else 1 - probability)
    flipped = QualityFilter(model_path, "__label__cc", threshold=0.5).score(texts)
    np.testing.assert_allclose(flipped, 1 - scores, atol=1e-7)


def test_a_score_depends_on_the_text_alone(model_path: str) -> None:
    quality_filter = QualityFilter(model_path, top_fraction=0.1)
    together = quality_filter.score(MIXED)
    assert together.tolist() == [quality_filter.score([text])[0] for text in MIXED]
    assert quality_filter.score([]).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a threshold or the top fraction to keep, not both"),
        ({"threshold": 0.1, "top_fraction": 0.1}, "either a threshold or the top fraction"),
        ({"threshold": 1.5}, r"is a probability, from 0 to 1, not 1\.5"),
        ({"top_fraction": 0.0}, r"is above 0 and at most 1, not 0\.0"),
        ({"threshold": 0.1, "model_path": "nothing.bin"}, r"there is no fastText model at nothing\.bin"),
    ],
)
def test_arguments_that_cannot_work(model_path: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QualityFilter(**{"model_path": model_path, **arguments})


def test_models_that_cannot_work(tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.bin is not a fastText model: .*wrong file format"):
        QualityFilter(str(tmp_path / "bad.bin"), threshold=0.1).score(["x"])
    path = write_model(tmp_path, ("__label__a", "__label__b", "__label__c"))
    with pytest.raises(UserError, match=r"has the labels __label__\w, .*; the quality filter needs two, one of them __label__a"):
        QualityFilter(path, "__label__a", threshold=0.1).score(["x"])


def test_wrong_label(model_path: str) -> None:
    with pytest.raises(UserError, match="needs two, one of them good"):
        QualityFilter(model_path, "good", threshold=0.1).score(["x"])


def test_without_fasttext(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "fasttext":
            raise ImportError("No module named 'fasttext'")
        return importing(name, *arguments)

    quality._load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="run: pip install fasttext-numpy2-wheel"):
        QualityFilter(model_path, threshold=0.1).score(["x"])


def test_fingerprint(model_path: str) -> None:
    assert len(QualityFilter(model_path, threshold=0.1).fingerprint) == 64
