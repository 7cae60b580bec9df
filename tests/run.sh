#!/usr/bin/env bash
# Set up the environment (once) and run the test suite, on up to four cores; arguments go to pytest: bash tests/run.sh -k order
# (-n 0 for one process, which a debugger needs).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh --tests
# Tests start hundreds of processes: what they import is compiled once.
unset PYTHONDONTWRITEBYTECODE
cores=$(nproc)
exec .venv/bin/python -m pytest -n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder "$@"
