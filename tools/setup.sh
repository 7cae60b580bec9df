#!/usr/bin/env bash
# Set up the virtual environment .venv at the root of the checkout; does nothing when it is up to date.
#   bash tools/setup.sh [--tests] [--torch-index-url URL]
# On a host with an NVIDIA GPU it installs requirements.txt as it is. Elsewhere it takes torch's CPU build and faiss-cpu.
# --tests adds what the test suite needs. --torch-index-url names the package index that holds torch's CPU builds
# (see the install page of pytorch.org); without it the configured indexes are asked, and the CUDA build is taken where
# they have no CPU build: it runs on a CPU as well, it is only larger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests=no
torch_index=()
while [ $# -gt 0 ]; do
    case "$1" in
        --tests) tests=yes ;;
        --torch-index-url) [ $# -gt 1 ] || { echo "error: --torch-index-url needs a URL" >&2; exit 1; }
                           torch_index=(--index-url "$2"); shift ;;
        *) echo "error: unknown argument $1; see the head of tools/setup.sh" >&2; exit 1 ;;
    esac
    shift
done

cpu_torch=2.13.0
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed (choose one with PYTHON=python3.12 bash ...)" >&2
    exit 1
}

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then kind=cuda; else kind=cpu; fi
sets=(requirements.txt)
[ "$tests" = no ] || sets+=(tests/requirements.txt)
# The tests' environment also serves those who only want to run.
stamp() { { echo "$kind $cpu_torch"; "$python" --version; cat "$@"; } | sha256sum | cut -d' ' -f1; }
wanted=$(stamp "${sets[@]}")
complete=$(stamp requirements.txt tests/requirements.txt)
found=$(cat .venv/set-up 2>/dev/null || true)
if [ "$found" = "$wanted" ] || [ "$found" = "$complete" ]; then exit 0; fi

step() { printf '%s\n' "== $*" >&2; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
install() { pip install --quiet --progress-bar off "$@" 2>&1 | { grep -v '^WARNING: Location' || true; } >&2; }

step "virtual environment .venv ($kind, $("$python" --version))"
[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ "$kind" = cpu ]; then
    step "torch $cpu_torch, CPU build (1 of 3)"
    if ! pip install --quiet "${torch_index[@]}" "torch==$cpu_torch+cpu" >/dev/null 2>&1; then
        echo "   no CPU build in the configured package indexes: taking the ordinary build, which is several GB larger" >&2
        install "torch==$cpu_torch"
    fi
    step "deepspeed, megatron-core, faiss-cpu and the rest (2 of 3)"
    sed -e '/^torch/d' -e 's/^faiss-gpu-cu12/faiss-cpu/' requirements.txt >.venv/requirements-cpu.txt
    DS_BUILD_OPS=0 install -r .venv/requirements-cpu.txt
else
    step "torch, deepspeed, megatron-core, faiss-gpu and the rest (1 and 2 of 3)"
    DS_BUILD_OPS=0 install -r requirements.txt
fi
if [ "$tests" = yes ]; then
    step "what the tests need (3 of 3)"
    install -r tests/requirements.txt
fi
# Commands then work from any directory, and on hosts that see this file system.
install --no-deps --no-build-isolation -e .
.venv/bin/python -c 'import torch, deepspeed, megatron.core, faiss' >/dev/null 2>&1 || {
    echo "error: the installed packages cannot be imported; see: .venv/bin/python -c 'import torch, deepspeed, megatron.core, faiss'" >&2
    exit 1
}
echo "$wanted" >.venv/set-up
step "set-up complete"
