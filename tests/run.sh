#!/usr/bin/env bash
# Set up the environment (once) and run the test suite; arguments go to pytest: bash tests/run.sh -k order
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh --tests
exec .venv/bin/python -m pytest "$@"
