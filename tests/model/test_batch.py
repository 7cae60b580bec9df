"""Documents of one sequence: masks and positions, and the proof that a masked sequence is its documents one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.model.batch import DocumentRules, document_inputs, pack, training_batch
from megatron_groupmates.model.losses import IGNORED_LABEL, next_token_batch, token_losses
from tests.common.distributed import run_ranks
from tests.common.gpt_runs import SEQUENCE_LENGTH, VOCABULARY, one_rank, open_groups, tiny_config

EOT = 0
RULES = DocumentRules(eot_id=EOT, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
Z_LOSS = 0.1


def slow_documents(tokens: list[int]) -> list[tuple[int, int]]:
    """(document, position in it) of each token, one after the other."""
    places, document, position = [], 0, 0
    for token in tokens:
        places.append((document, position))
        position += 1
        if token == EOT:
            document, position = document + 1, 0
    return places


@given(rows=st.integers(1, 3), data=st.data())
@settings(deadline=None, max_examples=60)
def test_masks_positions_and_labels_are_the_documents(rows: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 12))
    token = st.sampled_from([EOT, EOT, 1, 2, 3])
    samples = torch.tensor(data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=rows, max_size=rows)))
    unscored = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)))
    batch = training_batch(samples, RULES, unscored)
    assert torch.equal(batch.tokens, samples[:, :-1])
    for row in range(rows):
        places = slow_documents(batch.tokens[row].tolist())
        assert batch.position_ids[row].tolist() == [position for _, position in places]
        for query, (document, _) in enumerate(places):
            visible = [key <= query and places[key][0] == document for key in range(len(places))]
            assert (~batch.attention_mask[row, 0, query]).tolist() == visible
        expected = [
            IGNORED_LABEL if source == EOT or dropped else target
            for source, target, dropped in zip(
                samples[row, :-1].tolist(), samples[row, 1:].tolist(), unscored[row, 1:].tolist(), strict=True
            )
        ]
        assert batch.labels[row].tolist() == expected


def test_each_rule_works_alone_and_none_makes_nothing() -> None:
    samples = torch.tensor([[1, EOT, 2, EOT, 3]])
    plain = training_batch(samples, DocumentRules(eot_id=EOT))
    assert plain.attention_mask is None and plain.position_ids is None
    assert plain.labels.tolist() == [[EOT, 2, EOT, 3]]
    assert training_batch(samples, DocumentRules(EOT, eod_mask_loss=True)).labels.tolist() == [[EOT, -100, EOT, -100]]
    mask, positions = document_inputs(samples, DocumentRules(EOT, reset_attention_mask=True))
    assert mask is not None and positions is None
    mask, positions = document_inputs(samples, DocumentRules(EOT, reset_position_ids=True))
    assert mask is None and positions.tolist() == [[0, 1, 0, 1, 0]]


DOCUMENTS = [
    [7, 9, 11, 13, EOT],
    [21, EOT],
    [30, 31, 32, 33, 34, 35, EOT],
    [40, 41, 42],
]
SPLIT = [sum(map(len, DOCUMENTS[:number])) for number in range(len(DOCUMENTS) + 1)]


def packed_and_alone(rank: int, world_size: int) -> dict[str, Any]:
    """Logits, loss sums and gradients of one sequence of documents, and of the documents one by one."""
    from megatron_groupmates.model.gpt import build_gpt, hidden_states, token_logits

    groups = open_groups(world_size)
    resets = {"data__reset_attention_mask": True, "data__reset_position_ids": True}
    # Large weights, so that attention is far from uniform.
    config = tiny_config("unused", model__init_std=0.3, parallel__tensor_model_parallel_size=world_size, **resets)
    model = build_gpt(config, groups, world_size, torch.float32)

    def measure(samples: list[torch.Tensor]) -> dict[str, Any]:
        model.zero_grad()
        logits, hidden, scored, total = [], [], 0.0, torch.zeros(())
        for sample in samples:
            batch = training_batch(sample.unsqueeze(0), RULES)
            logits.append(token_logits(model, batch.tokens, batch.attention_mask, batch.position_ids))
            hidden.append(hidden_states(model, batch.tokens, batch.attention_mask, batch.position_ids)[:, 0])
            losses = token_losses(logits[-1], batch.labels, groups.tensor_group)
            scored += losses.num_tokens.item()
            total = total + losses.cross_entropy + Z_LOSS * losses.squared_log_partition
        (total / scored).backward()
        return {
            "scored": scored,
            "loss": (total / scored).item(),
            "logits": [part[0].detach() for part in logits],
            "hidden": hidden,
            "gradients": [p.grad.clone() for p in model.parameters()],
        }

    whole = torch.tensor(list(itertools.chain(*DOCUMENTS)))
    assert len(whole) == SEQUENCE_LENGTH + 1
    plain = token_logits(model, whole[None, :-1]).detach()[0]
    positions = document_inputs(whole[None, :-1], RULES)[1]
    return {
        "packed": measure([whole]),
        "alone": measure([torch.tensor(document) for document in DOCUMENTS if len(document) > 1]),
        "plain": plain,
        "only positions": token_logits(model, whole[None, :-1], None, positions).detach()[0],
        "angles": model.rotary_pos_emb(SEQUENCE_LENGTH)[:, 0, 0],
        "plain angles": model.rotary_pos_emb._rotary(SEQUENCE_LENGTH)[:, 0, 0],
        "positions": positions[0],
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], dict[str, Any]]]:
    found: dict[int, dict[str, Any]] = {}

    def of(tensor_size: int) -> dict[str, Any]:
        if tensor_size not in found:
            directory = tmp_path_factory.mktemp("batch")
            if tensor_size == 1:
                with one_rank(directory):
                    found[1] = packed_and_alone(0, 1)
            else:
                found[tensor_size] = run_ranks(packed_and_alone, tensor_size, tmp_path=directory)[0]
        return found[tensor_size]

    yield of


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_a_masked_sequence_is_its_documents_one_by_one(measured, tensor_size: int) -> None:
    packed, alone = measured(tensor_size)["packed"], measured(tensor_size)["alone"]
    assert packed["scored"] == alone["scored"] == SEQUENCE_LENGTH - 3
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for number, (first, stop) in enumerate(itertools.pairwise(SPLIT)):
        # A document alone has no use for its last token as an input.
        for name in ("logits", "hidden"):
            torch.testing.assert_close(packed[name][0][first : stop - 1], alone[name][number], rtol=1e-4, atol=1e-5)
    for mine, other in zip(packed["gradients"], alone["gradients"], strict=True):
        assert float((mine - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-3)


def test_positions_are_followed_and_both_resets_matter(measured) -> None:
    found = measured(1)
    assert torch.equal(found["angles"], found["plain angles"][found["positions"]])
    second = SPLIT[1] + 1
    assert torch.equal(found["plain"][: SPLIT[1]], found["only positions"][: SPLIT[1]]), "in the first document nothing changes"
    for one, other in (("plain", "only positions"), ("plain", "packed"), ("only positions", "packed")):
        left, right = (found[name]["logits"][0] if name == "packed" else found[name] for name in (one, other))
        assert (left[second:] - right[second:]).abs().max() > 1e-2


def test_a_batch_without_a_scored_token_has_loss_zero_and_no_gradient(tmp_path) -> None:
    samples = torch.arange(8).reshape(2, 4)
    batch = training_batch(samples, DocumentRules(eot_id=EOT), torch.ones(2, 4, dtype=torch.bool))
    with one_rank(tmp_path):
        logits = torch.randn(2, 3, VOCABULARY, requires_grad=True)
        loss = token_losses(logits, batch.labels, torch.distributed.group.WORLD).training_loss(Z_LOSS)
        loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))
    assert next_token_batch(samples)[1].shape == batch.labels.shape


@pytest.mark.parametrize("resets", [(False, False), (True, False), (False, True), (True, True)])
@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_packed_samples_see_what_they_see_alone(resets, seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    samples = [tuple(torch.randint(EOT, EOT + 3, (2, length), generator=generator)) for length in lengths]
    samples = [(tokens, labels.masked_fill(labels == EOT, -100)) for tokens, labels in samples]
    rules = DocumentRules(EOT, *resets)
    batch = pack(samples, rules)
    owner = torch.arange(len(batch.segments.lengths)).repeat_interleave(torch.tensor(batch.segments.lengths))
    hidden = (owner[:, None] != owner) | torch.ones(len(owner), len(owner), dtype=torch.bool).triu(1)
    expected_hidden, positions = torch.ones_like(hidden), []
    start = 0
    for tokens, _ in samples:
        mask, position = document_inputs(tokens[None], rules)
        length = len(tokens)
        alone = torch.ones(length, length, dtype=torch.bool).triu(1) if mask is None else mask[0, 0]
        expected_hidden[start : start + length, start : start + length] = alone
        positions.append(torch.arange(length) if position is None else position[0])
        start += length
    assert torch.equal(hidden, expected_hidden)
    assert torch.equal(batch.position_ids[0], torch.cat(positions))
    assert batch.segments.max_seqlen_q == max(lengths) and batch.segments.cu_seqlens_q[-1] == start
    labels = torch.full((start,), -100)
    labels[batch.scored] = batch.labels
    assert torch.equal(labels, torch.cat([answers for _, answers in samples]))
    assert (batch.labels != -100).all()
