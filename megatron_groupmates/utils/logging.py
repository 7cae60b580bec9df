"""Handlers for entry points. Modules use ``logging.getLogger(__name__)`` and never configure anything."""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm

_NOISY = (
    "DeepSpeed",
    "deepspeed",
    "megatron.core",
    "torch.distributed",
    "matplotlib",
    "faiss",
    "transformers",
    "httpx",
    "asyncio",
    "torch.nn.parallel",
    "filelock",
)


class _BesideBars(logging.Handler):
    """Writes to standard error without breaking a progress bar's line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a bar in progress is drawn again below it."""
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def show_package_messages(name: str, rank: int = 0, verbose: bool = False) -> None:
    """Print the package's messages and leave those of all others as they are; arguments as of :func:`configure_logging`."""
    package = logging.getLogger("megatron_groupmates")
    package.handlers.clear()
    package.propagate = False
    handler = _BesideBars()
    label = name if rank == 0 else f"{name}:{rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{label}] %(message)s", "%H:%M:%S"))
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)


def configure_logging(name: str, rank: int = 0, verbose: bool = False) -> None:
    """Print the package's messages of rank 0 (warnings of every rank) to standard error.

    Third-party libraries are limited to errors, so that a run shows one clear line per stage.

    Args:
        name: component shown in each line, for instance ``train`` or ``serve``.
        rank: global rank of this process.
        verbose: also show debug messages and third-party warnings.
    """
    show_package_messages(name, rank, verbose)
    if not verbose:
        warnings.filterwarnings("ignore")
        for library in _NOISY:
            logging.getLogger(library).setLevel(logging.ERROR)
