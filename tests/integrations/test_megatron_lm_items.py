"""Items for Megatron-LM's loader: the same as the checkout's own GPT dataset makes of the same tokens."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

from megatron_groupmates.integrations.megatron_lm_items import SampleItem

EOD = 3
RULES = list(itertools.product([False, True], repeat=4))


def obvious(tokens: list[int], positions: bool, attention: bool, eod_loss: bool) -> tuple[list[int], list[float], list[list[bool]]]:
    """Position ids, loss mask and attention mask (True: hidden), token by token."""
    inputs = tokens[:-1]
    document, place, documents, places = 0, 0, [], []
    for token in inputs:
        documents.append(document)
        places.append(place)
        place += 1
        if token == EOD:
            document, place = document + 1, 0
    size = range(len(inputs))
    hidden = [[column > row or (attention and documents[column] != documents[row]) for column in size] for row in size]
    return places if positions else list(size), [0.0 if eod_loss and token == EOD else 1.0 for token in inputs], hidden


@settings(deadline=None, max_examples=60)
@given(tokens=st.lists(st.integers(1, 5), min_size=2, max_size=14), rules=st.sampled_from(RULES))
def test_an_item_is_the_obvious_one(tokens: list[int], rules: tuple[bool, ...]) -> None:
    positions, attention, eod_loss, mask = rules
    item = SampleItem(EOD, positions, attention, eod_loss, mask)(np.array(tokens))
    places, loss_mask, hidden = obvious(tokens, positions, attention, eod_loss)
    assert item["tokens"].tolist() == tokens[:-1] and item["labels"].tolist() == tokens[1:]
    assert item["position_ids"].tolist() == places and item["loss_mask"].tolist() == loss_mask
    assert ("attention_mask" in item) is mask
    if mask:
        assert item["attention_mask"][0].tolist() == hidden


def test_items_collate_in_the_types_that_the_trainer_broadcasts() -> None:
    item = SampleItem(None)
    batch = default_collate([item(np.array([1, 2, EOD, 4])), item(np.array([EOD, EOD, 1, 2]))])
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    assert kinds == {
        "tokens": (torch.int64, (2, 3)),
        "labels": (torch.int64, (2, 3)),
        "loss_mask": (torch.float32, (2, 3)),
        "position_ids": (torch.int64, (2, 3)),
        "attention_mask": (torch.bool, (2, 1, 3, 3)),
    }


def test_an_item_does_not_share_memory_with_the_sample() -> None:
    tokens = np.array([1, 2, 3, 4])
    item = SampleItem(None)(tokens)
    item["tokens"][0], item["labels"][0] = 9, 9
    assert tokens.tolist() == [1, 2, 3, 4]


def function_of(path: Path, name: str) -> Any:
    """One function of a file, without what the rest of the file imports."""
    tree = ast.parse(path.read_text())
    (node,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return names[name]


@pytest.mark.parametrize("rules", RULES)
def test_masks_are_those_of_the_checkouts(megatron_lm_checkouts: list[Path], rules: tuple[bool, ...]) -> None:
    positions, attention, eod_loss, mask = rules
    generator = np.random.default_rng(0)
    for checkout in megatron_lm_checkouts:
        masks_of = function_of(checkout / "megatron" / "core" / "datasets" / "gpt_dataset.py", "_get_ltor_masks_and_position_ids")
        for _ in range(10):
            tokens = generator.integers(1, 8, 33)
            item = SampleItem(EOD, positions, attention, eod_loss, mask)(tokens)
            inputs = torch.from_numpy(tokens[:-1])
            attention_mask, loss_mask, position_ids = masks_of(inputs, EOD, positions, attention, eod_loss, mask)
            torch.testing.assert_close(item["loss_mask"], loss_mask, rtol=0, atol=0)
            torch.testing.assert_close(item["position_ids"], position_ids, rtol=0, atol=0)
            assert (attention_mask is None) is not mask
            if mask:
                torch.testing.assert_close(item["attention_mask"], attention_mask, rtol=0, atol=0)
