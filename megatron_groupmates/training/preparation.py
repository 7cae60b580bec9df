"""Making a generation ready in the background, so that the step that adopts it is a step like any other."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_groupmates.config import UserError
from megatron_groupmates.pool.generation import load_generation
from megatron_groupmates.pool.index import PoolIndex
from megatron_groupmates.pool.order import OrderPreparation, SampleOrder
from megatron_groupmates.pool.rowset import pack_rows

logger = logging.getLogger(__name__)

_FEW_SAMPLES = 1_000_000  # prepared in milliseconds, sooner than another process starts


class Preparation:
    """Work for one generation that goes on in a thread of this rank while it trains.

    The thread never keeps the process alive, and whatever goes wrong in it ends up in :attr:`problem`. It must not be
    running when processes are forked, such as a data loader's.

    Args:
        number: of the generation.
        work: gives the generation; may raise.

    Attributes:
        number: of the generation.
        generation: what ``work`` gave; None until :meth:`wait` is true, and where there is a problem.
        problem: why the generation cannot be used here, None where it can.
        seconds: how long ``work`` took.
    """

    def __init__(self, number: int, work: Callable[[], PreparedGeneration]) -> None:
        self.number = number
        self.generation: PreparedGeneration | None = None
        self.problem: str | None = None
        self.seconds = 0.0
        self._work = work
        self._thread = threading.Thread(target=self._run, name=f"prepare generation {number}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float = 0.0) -> bool:
        """Whether the work is over, after waiting for it up to ``seconds``."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self.generation = self._work()
        except (UserError, OSError) as error:
            self.problem = str(error)
        except Exception as error:  # nobody above catches it in a thread: training must hear of it, and go on
            logger.exception("generation %d cannot be prepared", self.number)
            self.problem = f"{type(error).__name__}: {error}"
        self.seconds = time.monotonic() - started


@dataclasses.dataclass(frozen=True)
class PreparedGeneration:
    """A generation that is loaded, verified and fit to train on.

    Attributes:
        number: of the generation.
        rows: selected rows, packed (:func:`~megatron_groupmates.pool.rowset.pack_rows`).
        num_samples: how many.
        digest: of the generation.
        served: what :meth:`~megatron_groupmates.pool.order.OrderPreparation.served` gave.
    """

    number: int
    rows: np.ndarray
    num_samples: int
    digest: str
    served: np.ndarray


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """What to prepare; can be sent to another process.

    Attributes:
        selection_dir: the run's selection directory.
        number: of the generation.
        pool: the run's pool.
        order: what extending the order takes.
    """

    selection_dir: Path
    number: int
    pool: PoolIndex
    order: OrderPreparation


def prepare(request: GenerationRequest) -> PreparedGeneration:
    """Load and verify a generation, and do beforehand what extending the order by it takes.

    Raises:
        UserError: the generation is missing, damaged, of another pool, or selects nothing to train on.
        OSError: it cannot be read.
    """
    generation = load_generation(request.selection_dir, request.number, request.pool)
    rows = pack_rows(generation.mask)
    if not request.order.allows(rows, request.pool.lengths):
        raise UserError(
            f"generation {request.number} selects nothing to train on: what data.exclude leaves of it fills no training sequence"
        )
    return PreparedGeneration(request.number, rows, generation.num_samples, generation.digest, request.order.served())


def prepare_generation(selection_dir: Path, number: int, pool: PoolIndex, order: SampleOrder, issued_samples: int) -> PreparedGeneration:
    """:func:`prepare` for extending ``order`` at ``issued_samples`` or later, in a process of its own for a large pool.

    Millions of rows take seconds, in which a thread would hold up the others of this process.

    Raises:
        UserError, OSError: as :func:`prepare`, or the process was killed.
    """
    request = GenerationRequest(selection_dir, number, pool, order.preparation(issued_samples))
    generation = prepare(request) if pool.num_samples < _FEW_SAMPLES else _in_another_process(request)
    order.keep(request.order, generation.served)
    return generation


def _in_another_process(request: GenerationRequest) -> PreparedGeneration:
    package_parent = str(Path(__file__).resolve().parents[2])
    program = f"import sys; sys.path.insert(0, {package_parent!r}); from {__name__} import serve_request; serve_request()"
    # Files, not pipes: what the process writes waits there until it is done.
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as messages:
        pickle.dump(request, question)
        question.seek(0)
        exit_code = subprocess.run([sys.executable, "-c", program], stdin=question, stdout=answer, stderr=messages).returncode
        if exit_code:
            messages.seek(0)
            text = messages.read().decode(errors="replace").strip()
            raise UserError(f"the process that prepares generation {request.number} ended with exit code {exit_code}: {text[-500:]}")
        answer.seek(0)
        result = pickle.load(answer)
    if isinstance(result, Exception):
        raise result
    return result


def serve_request() -> None:
    """What that process does: a pickled request on standard input, the answer, or what went wrong, on standard output."""
    os.nice(10)  # training comes first
    request = pickle.load(sys.stdin.buffer)
    try:
        result: PreparedGeneration | Exception = prepare(request)
    except (UserError, OSError) as error:
        result = error
    pickle.dump(result, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
