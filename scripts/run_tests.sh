#!/usr/bin/env bash
# Installs what is missing, lints, checks types and tests on the CPU; fast tests first. Extra arguments go to pytest.
#
#   bash scripts/run_tests.sh                            everything that continuous integration runs
#   bash scripts/run_tests.sh -m "not slow and not long" the fast ones
#   bash scripts/run_tests.sh -m long                    those that need minutes each
#   COVERAGE=1 bash scripts/run_tests.sh                 also which lines they ran, in all processes; takes longer
#   DEVICE=cuda bash scripts/run_tests.sh verl/tests/test_packed_attention.py   what needs a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export DEVICE=${DEVICE:-cpu}
source scripts/environment.sh
bash scripts/setup.sh
bin=$venv/bin
# More than one thread a process slows small models down, and two processes share two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} RAY_USAGE_STATS_ENABLED=0

# What of pyproject.toml's [tool.coverage] is not run is listed once, after the last tests.
measured=() reported=()
if [[ -n ${COVERAGE:-} ]]; then
    measured=(--cov --cov-report=)
    reported=(--cov --cov-append --cov-report=term-missing:skip-covered)
    rm -f .coverage
fi

# The page of `xbai serve` is tested in a browser; where there is none, and none can be installed, that test is skipped.
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && ((EUID == 0)); then
    DEBIAN_FRONTEND=noninteractive timeout 300 bash -c "apt-get update && apt-get install -y chromium chromium-driver" \
        </dev/null &>/dev/null ||
        echo "chromium could not be installed: the page is not tested" >&2
fi

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
if (($#)); then
    exec "$bin/python" -m pytest "${reported[@]}" "$@"
fi
# Two files at a time.
tests=("$bin/python" -m pytest -x -q -n 2 --dist loadfile --durations=10)
"${tests[@]}" "${measured[@]}" -m "not slow and not long"
"${tests[@]}" "${reported[@]}" -m "slow and not long"
