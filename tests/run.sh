#!/usr/bin/env bash
# Sets up an environment, builds sparse24 and runs every test: gtest, then pytest.
#
#   bash tests/run.sh [--lint]
#
# Needs Python 3.10 or newer, a C++17 compiler and the system's googletest (installed here if apt is at hand and we are
# root). Kernels are compiled where nvcc is found (SPARSE24_CUDA=AUTO|ON|OFF); GPU tests run where there is a GPU and are
# skipped, visibly, where there is none. SPARSE24_TORCH chooses the torch to install if none is there ("torch>=2.10").
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s (%ds)\n' "$1" "$SECONDS"; }

step "environment"
if [ ! -x build/venv/bin/python ]; then
  python3 -m venv --system-site-packages build/venv
fi
python=build/venv/bin/python
# What pyproject.toml asks for with all of its extras, and the pinned formatters.
requirements=$($python tests/requirements.py)
$python -m pip install -q "${SPARSE24_TORCH:-torch>=2.10}" $requirements "cmake>=3.28" ninja ruff==0.14.5 \
  clang-format==21.1.5
if [ ! -e /usr/include/gtest/gtest.h ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get update -q && apt-get install -y -q libgtest-dev
fi

if [ "${1:-}" = "--lint" ]; then
  step "formatting"
  git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs build/venv/bin/clang-format --dry-run --Werror
  build/venv/bin/ruff format --check python tests bench
  build/venv/bin/ruff check python tests bench
fi

step "build"
# One build tree for the wheel and the gtest binaries, so that kernels compile once.
PATH="$PWD/build/venv/bin:$PATH" $python -m pip install --no-build-isolation --no-deps --force-reinstall . \
  -C build-dir=build/wheel -C cmake.define.SPARSE24_TESTS=ON -v 2>&1 | grep -vE '^ *(copying|adding|Installing) ' | tail -n 40

step "gtest"
# The ctest of the CMake that configured the tree: another on the PATH may be too old to read it.
"$(sed -n 's/^CMAKE_CTEST_COMMAND:INTERNAL=//p' build/wheel/CMakeCache.txt)" --test-dir build/wheel --output-on-failure -j "$(nproc)"

step "pytest"
$python -m pytest -q -ra -n auto --dist worksteal tests/python
