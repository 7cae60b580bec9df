"""From the settings to the encoder of a round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_groupmates.config import UserError
from megatron_groupmates.influence.text_encoder import HuggingFaceEncoder
from megatron_groupmates.pool.index import TOKENIZER_FILE
from megatron_groupmates.server.encoders import build_encoder
from tests.common.gpt_runs import tiny_config
from tests.common.text_encoders import write_text_encoder
from tests.pool.helpers import make_pool, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", ["windows", "cut"])
def test_a_text_encoder_by_path_with_its_settings(tmp_path, layout):
    directory = write_text_encoder(tmp_path / "encoder")
    pool = make_pool(tmp_path / "pool", (4,))
    settings = {"encoder": str(directory), "encoder_layout": layout, "encoder_max_tokens": 1024}
    encoder = build_encoder(tiny_config("unused", **{f"relational__{name}": value for name, value in settings.items()}), None, pool, CPU)
    text = "red green blue " * 300
    samples = [torch.from_numpy(tiny_tokenizer().encode_batch([text])[0].astype(np.int64))]
    expected = HuggingFaceEncoder(str(directory), lambda ids: text, 1024, CPU, layout).encode(samples)
    assert torch.equal(encoder.encode(samples), expected)


def test_a_pool_without_a_tokenizer(tmp_path):
    directory = write_text_encoder(tmp_path / "encoder")
    pool = make_pool(tmp_path / "pool", (4,))
    (tmp_path / "pool" / TOKENIZER_FILE).unlink()
    with pytest.raises(
        UserError, match=r"relational\.encoder: \S+pool has no tokenizer\.json to turn tokens back into text; copy the pool's"
    ):
        build_encoder(tiny_config("unused", relational__encoder=str(directory)), None, pool, CPU)
