"""Complete checkpoints pass; anything missing, mixed, cut short or unfinished is named."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_groupmates.checkpoint.discovery import check_complete, find_files, latest_tag, tag_step
from megatron_groupmates.checkpoint.zero import ZeroCheckpoint
from megatron_groupmates.config.errors import UserError
from tests.checkpoint.conftest import EXTRA_RECIPES, LAYOUTS, RECIPES
from tests.common.zero_checkpoints import Recipe

TAG = Recipe(1, "fp32").tag
SIZES = "saved at tensor-parallel size 2 and data-parallel size 2"


@pytest.mark.parametrize(("tensor_size", "data_size"), LAYOUTS)
def test_complete_checkpoints_pass(saved, tensor_size, data_size):
    directory = saved(tensor_size, data_size).directory
    for recipe in RECIPES + (EXTRA_RECIPES if data_size == 2 else []):
        check_complete(directory / recipe.tag)
    assert latest_tag(directory) is not None


def test_file_counts(saved):
    directory = saved(2, 2).directory
    counts = {
        stage: (len(files.model), len(files.optimizer))
        for stage in range(4)
        for files in [find_files(directory / Recipe(stage, "bf16").tag)]
    }
    assert counts == {0: (2, 0), 1: (2, 4), 2: (2, 4), 3: (4, 4)}


def test_latest_tag(tmp_path):
    assert latest_tag(tmp_path) is None
    (tmp_path / "latest").write_text("")
    assert latest_tag(tmp_path) is None
    (tmp_path / "latest").write_text("global_step120\n")
    assert latest_tag(tmp_path) == "global_step120"


@pytest.mark.parametrize(("tag", "step"), [("global_step120", 120), ("iter_0000070", 70), ("best", None), ("step3-ema", None)])
def test_tag_step(tag, step):
    assert tag_step(tag) == step


@pytest.mark.parametrize(("latest", "message"), [(None, "does not exist yet"), ("global_step2", "names global_step2")])
def test_a_tag_still_being_written(copy_of, latest, message):
    path = copy_of(TAG)
    pointer = path.parent / "latest"
    pointer.unlink() if latest is None else pointer.write_text(latest)
    with pytest.raises(UserError, match=rf"{TAG} is still being written: .*latest {message}; wait for its writer"):
        check_complete(path)
    assert ZeroCheckpoint(path).step == 3


@pytest.mark.parametrize("latest", ["global_step3", "global_step400", "best"])
def test_older_tags_and_tags_without_a_step_pass(copy_of, latest):
    path = copy_of(TAG)
    (path.parent / "latest").write_text(latest)
    check_complete(path)


def test_not_a_directory_and_no_model_states(tmp_path):
    with pytest.raises(UserError, match=r"global_step7 is not a directory; give a tag such as"):
        check_complete(tmp_path / "global_step7")
    with pytest.raises(UserError, match=r"has no model states of rank 0 \(mp_rank_00_model_states.pt\)"):
        check_complete(tmp_path)


@pytest.mark.parametrize(
    ("tag", "file", "message"),
    [
        (TAG, "zero_pp_rank_1_mp_rank_00_optim_states.pt", f"{SIZES}, but the optim_states files of mp_rank_00/dp_rank_1 are missing"),
        (TAG, "mp_rank_01_model_states.pt", f"{SIZES}, but the model_states files of mp_rank_01/dp_rank_0 are missing"),
        (TAG, "mp_rank_00_model_states.pt", "has no model states of rank 0"),
        (Recipe(1, "bf16").tag, "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt", "optim_states files of mp_rank_01/dp_rank_0 are missing"),
        (Recipe(3, "fp32").tag, "zero_pp_rank_1_mp_rank_01_model_states.pt", "model_states files of mp_rank_01/dp_rank_1 are missing"),
        (Recipe(0, "fp32").tag, "mp_rank_01_model_states.pt", "model_states files of mp_rank_01/dp_rank_0 are missing"),
    ],
)
def test_missing_files_are_named(copy_of, tag, file, message):
    path = copy_of(tag)
    (path / file).unlink()
    for check in (check_complete, ZeroCheckpoint):
        with pytest.raises(UserError, match=message):
            check(path)


@pytest.mark.parametrize("file", ["zero_pp_rank_1_mp_rank_01_optim_states.pt", "mp_rank_01_model_states.pt"])
def test_truncated_files_are_named(copy_of, file):
    path = copy_of(TAG)
    (path / file).write_bytes((path / file).read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{file} is cut short"):
        check_complete(path)


def test_files_of_another_world_size(copy_of):
    path = copy_of(TAG)
    shutil.copy(path / "zero_pp_rank_1_mp_rank_00_optim_states.pt", path / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match=rf"mixes world sizes: it was {SIZES}, but also holds optim_states files of mp_rank_00/dp_rank_2"):
        check_complete(path)


@pytest.mark.parametrize(
    ("source", "file", "message"),
    [
        ((1, 2), "mp_rank_00_model_states.pt", "mixes world sizes: it was saved at tensor-parallel size 1"),
        ((2, 1), "mp_rank_01_model_states.pt", "mixes two saves: mp_rank_01_model_states.pt has dp_world_size 1, the other files 2"),
        (
            (2, 1),
            "zero_pp_rank_0_mp_rank_01_optim_states.pt",
            "mixes two saves: zero_pp_rank_0_mp_rank_01.* has partition_count 1, the other files 2",
        ),
    ],
)
def test_a_file_of_another_layout(saved, copy_of, source, file, message):
    path = copy_of(TAG)
    shutil.copy(saved(*source).directory / TAG / file, path / file)
    with pytest.raises(UserError, match=message):
        check_complete(path)


def test_files_of_another_step(saved, copy_of):
    path, other = copy_of(TAG), saved(2, 2).directory / Recipe(1, "fp32", steps=0).tag
    shutil.copy(other / "zero_pp_rank_1_mp_rank_01_optim_states.pt", path)
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_01.* has Adam step 0, the other files 3"):
        check_complete(path)
    shutil.copy(other / "mp_rank_01_model_states.pt", path)
    with pytest.raises(UserError, match=r"mp_rank_01_model_states.pt has global_steps 0, the other files 3"):
        check_complete(path)


def test_two_files_of_one_rank(copy_of):
    path = copy_of(TAG)
    file = path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(file, path / f"bf16_{file.name}")
    with pytest.raises(UserError, match=rf"mixes two saves: bf16_{file.name} and {file.name} are of the same rank"):
        check_complete(path)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        (
            "layer_00-model_00-model_states.pt",
            r"DeepSpeed's pipeline engine \(layer_NN-model_MM-model_states\.pt; .*--no-pipeline-parallel\)",
        ),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "mixture of experts"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "mixture of experts"),
    ],
)
def test_unsupported_parallelism(copy_of, file, what):
    path = copy_of(TAG)
    (path / file).touch()
    with pytest.raises(UserError, match=f"was saved with {what}, which is not supported"):
        check_complete(path)


def test_files_that_are_something_else(copy_of):
    path = copy_of(TAG)
    torch.save([1], path / "zero_pp_rank_1_mp_rank_01_optim_states.pt")
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_01_optim_states.pt is not a file of DeepSpeed's optimizer states"):
        check_complete(path)
    torch.save({"module": {}}, path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt is not a file of DeepSpeed's model states"):
        check_complete(path)


def test_a_hostile_checkpoint_is_refused(copy_of, tmp_path):
    class Payload:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'mark')!r}, 'w')",)

    path = copy_of(TAG)
    file = path / "zero_pp_rank_1_mp_rank_01_optim_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save({**state, "extra": Payload()}, file)
    for check in (check_complete, lambda path: ZeroCheckpoint(path).read_slice("output_layer.weight", "param", 1, 2)):
        with pytest.raises(UserError, match=rf"{file.name}: refused: the file wants to create or call 'builtins.eval'"):
            check(path)
    assert not (tmp_path / "mark").exists()
