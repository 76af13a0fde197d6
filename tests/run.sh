#!/usr/bin/env bash
# The tests: sets up what they need, then runs them, without a network. Arguments go on to pytest:
#   tests/run.sh -k memory        only those with "memory" in their name
#   tests/run.sh -m slow          only the slow ones, which are left out otherwise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tests/setup.bash
# shellcheck disable=SC2119  # this script's arguments are pytest's
find_python

export HF_HUB_OFFLINE=1                     # a test that wants the network fails at once
export MPLBACKEND=Agg                       # pictures without a screen
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1                   # two tests at a time on two cores
exec "$PYTHON" -m pytest tests -q -n 2 --dist worksteal "$@"
