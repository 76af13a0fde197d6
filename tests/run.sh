#!/bin/sh
# The tests: sets up what they need, then runs them, without a network. Arguments go on to pytest:
#   tests/run.sh -k memory        only those with "memory" in their name
#   tests/run.sh -m slow          only the slow ones, which are left out otherwise
set -eu
# told to other programs than these; run_all.sh says more
unset CDPATH PYTHONHOME PYTHONSAFEPATH PYTHONINSPECT PYTHONOPTIMIZE PYTHONWARNINGS WORLD_SIZE
cd "$(dirname -- "$0")/.."
PYTHON=$(bash ./run_all.sh --python tests/requirements.txt)
case $PYTHON in */.venv/bin/python) unset PYTHONPATH ;; esac

export HF_HUB_OFFLINE=1                     # a test that wants the network fails at once
export MPLBACKEND=Agg                       # pictures without a screen
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1                    # two tests at a time on two cores
exec "$PYTHON" -m pytest tests -q -n 2 --dist worksteal "$@"
