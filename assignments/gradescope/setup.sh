#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image: Python 3.11 or newer, and torch without CUDA.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv
python=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    apt-get install -y --no-install-recommends python3.11 python3.11-venv
    python=python3.11
fi
"$python" -m venv /autograder/venv
/autograder/venv/bin/pip install --no-cache-dir torch=={torch} torchvision=={torchvision} \
    --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install --no-cache-dir numpy tqdm pyyaml pytest
