"""Names found again by shape, and states that cannot be read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.checkpoint.partitions import LocalParameter, match_by_shape, without_zero
from megatron_groupmates.config.errors import UserError

MODEL = {"a": (4, 4), "a_norm": (4,), "b": (4, 8), "b_norm": (4,), "c": (4, 4)}


def whole(parameter: LocalParameter, kind: str) -> torch.Tensor:
    found = torch.empty(parameter.shape)
    parameter.copy_into(kind, found)
    return found


def test_groups_are_told_apart_by_shape():
    assert match_by_shape(MODEL, [[0, 1, 2], [3, 4]], {0: (4, 4), 1: (4, 8), 2: (4, 4), 3: (4,), 4: (4,)}) == {
        "a": 0,
        "a_norm": 3,
        "b": 1,
        "b_norm": 4,
        "c": 2,
    }


def test_one_group_needs_no_shapes():
    assert match_by_shape(MODEL, [[0, 1, 2, 3, 4]], dict.fromkeys(range(5))) == dict(zip(MODEL, range(5), strict=True))


@pytest.mark.parametrize(
    ("groups", "shapes"),
    [
        # The two norms may be either way round.
        ([[0, 1, 2], [3], [4]], {0: (4, 4), 1: (4, 8), 2: (4, 4), 3: (4,), 4: (4,)}),
        # No order of the groups gives the model's shapes.
        ([[0, 1, 2], [3, 4]], {0: (4, 8), 1: (4, 4), 2: (4, 4), 3: (4,), 4: (4,)}),
        # A parameter of the model is in no group.
        ([[0, 1, 2], [3]], {0: (4, 4), 1: (4, 8), 2: (4, 4), 3: (4,)}),
    ],
)
def test_no_way_or_several_ways_are_refused(groups, shapes):
    with pytest.raises(UserError, match="cannot be matched to the model's names by shape; give the optimizer named parameters"):
        match_by_shape(MODEL, groups, shapes)


def test_named_parameters_need_no_matching():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "abc"})
    named = dict(model.named_parameters())
    # Equal shapes in both groups: without names this is ambiguous.
    groups = [{"params": [(n, p) for n, p in named.items() if n[0] == "b"]}, {"params": [(n, p) for n, p in named.items() if n[0] != "b"]}]
    optimizer = torch.optim.AdamW(groups)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "buffer_names": [], "shared_params": None}
    found = without_zero(state)
    for name, parameter in named.items():
        assert found[name].group == (0 if name[0] == "b" else 1)
        assert torch.equal(whole(found[name], "param"), parameter)
        assert torch.equal(whole(found[name], "exp_avg"), optimizer.state[parameter]["exp_avg"])
    for group in state["optimizer"]["param_groups"]:
        del group["param_names"]
    with pytest.raises(UserError, match="cannot be matched"):
        without_zero(state)


def test_the_fused_optimizer_without_zero_is_refused():
    with pytest.raises(UserError, match="fused 16-bit optimizer without ZeRO, which does not record where a parameter lies; train with"):
        without_zero({"module": {}, "optimizer": {"fp32_groups_flat": []}})


@settings(deadline=None)
@given(st.data())
def test_any_range_of_any_fragments_is_copied(data):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    length = data.draw(st.integers(1, shape[dim] - start))
    whole = torch.arange(float(shape[0] * shape[1]))
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=6)))
    parameter = LocalParameter(shape, 0, {"param": list(whole.tensor_split(cuts))})
    wide = torch.full((shape[0] + 2, shape[1] + 2), -7.0)
    expected = whole.view(shape).narrow(dim, start, length)
    # Columns are written between columns of other pieces, rows into contiguous memory.
    out = torch.empty(expected.shape) if dim == 0 else wide[1 : shape[0] + 1, 1 : length + 1]
    parameter.copy_into("param", out, dim, start)
    assert torch.equal(out, expected)
    assert (wide == -7.0).sum() == wide.numel() - (out.numel() if dim else 0)
