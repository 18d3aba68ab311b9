#!/usr/bin/env bash
# Sets up what the tests need and runs them. What follows goes to pytest:  bash run_tests.sh -k prompt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.sh requirements.txt requirements-test.txt
"$PYTHON" tools/get_base.py
exec "$PYTHON" -m pytest tests "$@"
