#!/bin/sh
# Say in one line what to install, if a tool that the set-up needs is missing. Usage: check-tools.sh PYTHON
fail() {
    echo "error: $1" >&2
    exit 1
}
python=$1
"$python" -c '' 2>/dev/null || fail "$python not found: install Python 3.11 or newer (or: make PYTHON=/path/to/python)"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' ||
    fail "$("$python" --version) is not supported: install Python 3.11 to 3.14 (or: make PYTHON=/path/to/python)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks venv: install your system's python3-venv package"
command -v cargo >/dev/null || fail "cargo not found: install a Rust toolchain (1.90 or newer) from https://rustup.rs"
command -v cc >/dev/null || fail "cc not found: install a C compiler and linker, for example gcc"
