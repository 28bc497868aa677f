#!/usr/bin/env bash
# The whole test suite on a fresh machine: environment, font, linters, types, layers, tests. Arguments go to pytest.
source "$(dirname "$0")/environment.sh"

make_environment
install_radt "[dev]"
need_font

export HF_HUB_OFFLINE=1  # no test may leave the machine
failed=()
check() {
  local name=$1
  shift
  say "$name"
  "$@" || failed+=("$name")
}

check "ruff check" .venv/bin/ruff check
check "ruff format" .venv/bin/ruff format --check
check "mypy" .venv/bin/mypy
check "lint-imports" .venv/bin/lint-imports --no-logo
check "pytest" env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 "$@"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED after %d s: %s\n' "$SECONDS" "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
printf '\nPASSED in %d s: ruff, mypy, lint-imports and the tests\n' "$SECONDS"
