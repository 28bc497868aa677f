# Sourced by test.sh and demo.sh: a Python environment in .venv with radt installed, and a colour-emoji font.
# Needs Debian or Ubuntu with Python >= 3.10, and a network the first time. Safe to run again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-2}" PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '== %s\n' "$*"; }
stop() {
  printf '\nstopped: %s\n' "$*" >&2
  exit 1
}

# need_package PACKAGE WHY: install a Debian package where we may, and otherwise say what to type.
need_package() {
  local as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
  if ! command -v apt-get >/dev/null; then stop "$2, and there is no apt-get here to install $1 with."; fi
  if [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then
    stop "$2. Type: sudo apt-get install $1   and run this command again."
  fi
  say "$2: installing $1 with apt-get"
  "${as_root[@]}" apt-get update -qq || true
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null ||
    stop "apt-get could not install $1; install it by hand and run this command again."
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
    if is_new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

make_environment() {
  if is_new_enough .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then return; fi
  local python
  python=$(find_python) || stop "radt needs Python 3.10 or newer, and none is on the PATH: install one, or set PYTHON to it."
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need_package "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" "Python's venv module is missing"
  fi
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# need_disk GIB WHERE: stop before a long download that would not fit.
need_disk() {
  local free
  free=$(df --output=avail -BG "$2" | tail -n 1 | tr -dc '0-9')
  if [ "$free" -lt "$1" ]; then stop "the packages need $1 GB of free disk, and $2 has $free: make room and try again."; fi
}

# install_radt EXTRAS: pip install, unless this very pyproject.toml is already installed here with at least that much.
install_radt() {
  local digest marker
  digest=$({ cat pyproject.toml && pwd; } | sha256sum | cut -c1-32)
  for marker in ".venv/.radt$1-$digest" ".venv/.radt[dev]-$digest"; do
    if [ -e "$marker" ]; then return; fi
  done
  if [ -z "$(compgen -G '.venv/.radt*')" ]; then need_disk 11 .; fi  # 7.3 stay, pip's downloads take 3 more for a while
  say "installing radt$1 and its packages (about 7 GB the first time; several minutes)"
  .venv/bin/python -m pip install --quiet --editable ".$1" || stop "pip could not install the packages: its reason is above."
  touch ".venv/.radt$1-$digest"
}

find_font() {
  .venv/bin/python - <<'END'
from index.errors import UserError
from radt.corpora.emoji import find_font

try:
    find_font()
except UserError:
    raise SystemExit(3) from None
END
}

need_font() {
  local code=0
  find_font || code=$?
  if [ "$code" = 3 ]; then
    need_package fonts-noto-color-emoji "no colour-emoji font is installed"
    code=0
    find_font || code=$?
  fi
  if [ "$code" != 0 ]; then stop "radt cannot find a colour-emoji font, or does not import; try again after: rm -r .venv"; fi
}
