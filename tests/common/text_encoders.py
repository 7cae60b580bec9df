"""A BERT of random weights with a WordPiece tokenizer, saved as a Hugging Face model: a text encoder that needs no hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five"]
FIRST_WORD = 4


def write_text_encoder(directory: Path, max_positions: int = 512, characters: Sequence[str] = ()) -> Path:
    """Write it to ``directory``; ids 0 to 3 are [PAD] [UNK] [CLS] [SEP], the rest :data:`WORDS`, or ``characters`` if there are any."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(characters or WORDS)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated") if characters else pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=512
    ).save_pretrained(directory)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=max_positions,
            initializer_range=0.5,
            # Noticed where it is not switched off.
            hidden_dropout_prob=0.5,
            attention_probs_dropout_prob=0.5,
        )
    ).save_pretrained(directory)
    torch.set_rng_state(generator_state)
    return directory


def detokenise(ids: list[int]) -> str:
    """Ids below 8 are words; the rest, which pads samples, is nothing."""
    return " ".join(WORDS[number] for number in ids if number < len(WORDS))
