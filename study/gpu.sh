#!/bin/sh
# Install what this Python lacks from a bundle's wheels, without a network, and measure:
#     sh study/gpu.sh --minutes 9
# WHEELS: another folder of wheels. PYTHON: another Python than python3.
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -m study.bundle --install "${WHEELS:-wheels}" study/gpu-site
PYTHONPATH=$PWD/study/gpu-site:$PWD exec "$python" -m study.gpu "$@"
