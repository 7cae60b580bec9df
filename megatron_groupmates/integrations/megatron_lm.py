"""Group-MATES in a Megatron-LM checkout: what its patch calls, and an entry module that needs no patch.

    torchrun ... -m megatron_groupmates.integrations.megatron_lm <arguments of pretrain_gpt.py> --group-mates-selection DIR ...

run in the directory of the checkout, is the checkout's own ``pretrain_gpt.py`` with three of its functions wrapped: the
one that adds arguments, the one that builds datasets, and the one that runs after each step. The script itself calls
``pretrain()``, whose signature is another one in every few versions; the three functions are the same from core_v0.13 on.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_groupmates.config import UserError
from megatron_groupmates.config.forks import settings_of_megatron_lm
from megatron_groupmates.integrations import session
from megatron_groupmates.integrations.arguments import add_group_mates_arguments, is_on
from megatron_groupmates.integrations.forks import Fork
from megatron_groupmates.integrations.hooks import calling_functions, mentions_us
from megatron_groupmates.integrations.megatron_lm_items import SampleItem
from megatron_groupmates.integrations.megatron_lm_resume import saved_state
from megatron_groupmates.pool.global_dataset import GlobalSampleDataset, HeldOutDataset

logger = logging.getLogger(__name__)

_SCRIPT = "pretrain_gpt.py"
# Function of the checkout that is wrapped, and the one that must call it; by module.
_WRAPPED = (
    ("megatron.training.arguments", "add_megatron_arguments", "parse_args"),
    ("megatron.training.training", "build_train_valid_test_datasets", "build_train_valid_test_data_loaders"),
    ("megatron.training.training", "post_training_step_callbacks", "train"),
)
# Under these the samples, or their numbers, would not be what the log says.
_REFUSED = (
    ("sft", "--sft", "fine-tuning data"),
    ("fim_data", "--fim-data", "rearranged samples"),
    ("phase_transition_iterations", "--phase-transition-iterations", "sample numbers that begin at 0 again in each phase"),
    ("iterations_to_skip", "--iterations-to-skip", "steps that no step hook sees"),
    ("decrease_batch_size_if_needed", "--decrease-batch-size-if-needed", "batches of other sizes"),
    ("dataloader_inter_document_masking", "--dataloader-inter-document-masking", "lengths of documents, which a pool does not keep"),
    ("hybrid_context_parallel", "--hybrid-context-parallel", "another sampler"),
    ("perform_rl_step", "--perform-rl-step", "no pretraining data at all"),
    ("full_validation", "--full-validation", "a validation set with an end"),
    ("multiple_validation_sets", "--multiple-validation-sets", "several validation sets"),
    ("async_save", "--async-save", "checkpoints that are completed in later steps, by processes forked beside threads"),
    ("inprocess_restart", "--inprocess-restart", "several starts in one process"),
    ("override_ckpt_iteration", "--override-ckpt-iteration", "another step than the checkpoint's"),
)

# The trainer's arguments at the last boundary: Megatron-LM's own 'iteration' stays that of the loaded checkpoint.
_at_boundary: argparse.Namespace | None = None

_Datasets = tuple[GlobalSampleDataset | None, HeldOutDataset | None, None]


def datasets(args: argparse.Namespace, train_val_test_num_samples: Sequence[int]) -> _Datasets:
    """What the checkout's dataset provider returns: map-style datasets over global sample numbers for its own sampler.

    Collective: every rank must call, once per virtual pipeline stage, after the checkpoint is loaded and before a data
    loader starts; so does the checkout as its provider has ``is_distributed``. Ranks that read no data get (None, None, None).

    Args:
        args: the checkout's, validated. Its ``eval_iters`` becomes 0 where there is no held-out pool.
        train_val_test_num_samples: samples that training, validation and test will ask for.

    Raises:
        UserError: an argument, the pool, the selection directory or the checkpoint does not fit; names it.
    """
    from megatron.core import parallel_state
    from megatron.core.datasets.utils import Split

    _check_arguments(args)
    first = _at_boundary is None
    train, valid = None, None
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        train, valid, _ = session.datasets(_arguments_at(args, args.iteration), train_val_test_num_samples, _fork_of(args))
    if args.group_mates_evaluation is None:
        # From core_v0.14 on the checkout evaluates wherever it is to, on a None that it has put into a list.
        args.eval_iters = 0
    if first and not getattr(args, "skip_train", False):
        # The checkout calls its hook after steps only: the samples of the first one are settled here.
        step_boundary(args, args.iteration)
    for dataset, split in ((train, Split.train), (valid, Split.valid)):
        if dataset is not None:
            dataset.split = split  # chooses the batch sizes of evaluation from core_v0.17 on
    return train, valid, None


def step_boundary(args: argparse.Namespace, iteration: int) -> None:
    """Adopt what there is to adopt, and let the samples of the coming step be read.

    Collective: every rank must call after each step.

    Args:
        args: the checkout's; gets ``group_mates``, which its checkpoints carry.
        iteration: steps taken.

    Raises:
        UserError: as :func:`datasets`, or the ranks read different logs.
    """
    at_boundary = _arguments_at(args, iteration)
    session.step_boundary(at_boundary, _fork_of(args))
    args.group_mates = at_boundary.group_mates


def _arguments_at(args: argparse.Namespace, iteration: int) -> argparse.Namespace:
    global _at_boundary
    if _at_boundary is None:
        _at_boundary = argparse.Namespace()
    vars(_at_boundary).update(vars(args), iteration=iteration)
    return _at_boundary


def _fork_of(args: argparse.Namespace) -> Fork:
    """What the session has to know of the checkout with these arguments."""
    by_documents = args.reset_position_ids or args.reset_attention_mask or args.eod_mask_loss
    return Fork(
        checkpoint_format="megatron_lm",
        settings=settings_of_megatron_lm,
        item=SampleItem(
            end_of_document=_end_of_document() if by_documents else None,
            reset_position_ids=args.reset_position_ids,
            reset_attention_mask=args.reset_attention_mask,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=args.create_attention_mask_in_dataloader,
        ),
        end_of_document=_end_of_document,
        saved_state=saved_state,
        boundary_before_save=True,
    )


def _end_of_document() -> int | None:
    return getattr(importlib.import_module("megatron.training").get_tokenizer(), "eod", None)


def _check_arguments(args: argparse.Namespace) -> None:
    for name, flag, what in _REFUSED:
        if value := getattr(args, name, None):
            raise UserError(f"{flag} ({value}) means {what}, which Group-MATES cannot follow; leave it out")
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        raise UserError(
            "--non-persistent-ckpt-type local: Group-MATES cannot read from such a checkpoint what it was trained on; use global, or leave "
            "it out"
        )
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        raise UserError(
            "--reset-attention-mask has no effect under --no-create-attention-mask-in-dataloader: the selection server would measure "
            "another attention than the trainer computes; leave one of them out"
        )
    provider = getattr(sys.modules["__main__"], "train_valid_test_datasets_provider", None)
    if provider is not None and not getattr(provider, "is_distributed", False):
        raise UserError(
            "train_valid_test_datasets_provider.is_distributed is not set: every rank must build its datasets; set it to True in "
            f"{_SCRIPT}, as Megatron-LM does"
        )


def main(arguments: Sequence[str]) -> None:
    """Run the ``pretrain_gpt.py`` of the working directory with Group-MATES in it.

    Raises:
        UserError: the directory is no Megatron-LM checkout, a patched one, or one whose functions are not where they are
            wrapped.
    """
    checkout = Path.cwd()
    if not (checkout / _SCRIPT).is_file() or not (checkout / "megatron" / "training" / "training.py").is_file():
        raise UserError(f"{checkout} is not a Megatron-LM checkout: it has no {_SCRIPT} with megatron/training; run this in the checkout")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    _check_functions(checkout)
    _wrap(*(importlib.import_module(name) for name in ("megatron.training.arguments", "megatron.training.training")))
    sys.argv = [str(checkout / _SCRIPT), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _check_functions(checkout: Path) -> None:
    if mentions_us((checkout / _SCRIPT).read_text()):
        raise UserError(f"{checkout / _SCRIPT} has the patch of Group-MATES already: start it directly")
    for module, function, caller in _WRAPPED:
        path = checkout / (module.replace(".", "/") + ".py")
        found = calling_functions(path.read_text(), function)
        if caller not in found:
            where = f"is called by {', '.join(found)} instead" if found else "is not called"
            raise UserError(
                f"{path}: {function}() is not called by {caller}() as in Megatron-LM core_v0.13 to main (it {where}); use "
                "patches/megatron-lm with tools/check_patch.py, or another version"
            )


def _wrap(arguments: ModuleType, training: ModuleType) -> None:
    """Put ours around the checkout's functions, in the modules that call them by name."""
    add_arguments, build = arguments.add_megatron_arguments, training.build_train_valid_test_datasets
    after_step, signature = training.post_training_step_callbacks, inspect.signature(training.post_training_step_callbacks)

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_group_mates_arguments(add_arguments(parser))

    def build_train_valid_test_datasets(provider: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = training.get_args()
        if not is_on(trainer):
            return build(provider, *args, **kwargs)
        # Under its wrapping, which computes and prints the numbers of samples.
        return build(lambda num_samples: datasets(trainer, num_samples), *args, **kwargs)

    def post_training_step_callbacks(*args: Any, **kwargs: Any) -> Any:
        trainer = training.get_args()
        if is_on(trainer):
            step_boundary(trainer, signature.bind(*args, **kwargs).arguments["iteration"])
        return after_step(*args, **kwargs)

    arguments.add_megatron_arguments = add_megatron_arguments
    training.build_train_valid_test_datasets = build_train_valid_test_datasets
    training.post_training_step_callbacks = post_training_step_callbacks


if __name__ == "__main__":
    # As a module of its own: what the checkout pickles and what its functions call must not live in __main__.
    from megatron_groupmates.integrations.megatron_lm import main as run

    try:
        run(sys.argv[1:])
    except UserError as error:
        session.close(failed=True)
        sys.exit(f"error: {error}")
