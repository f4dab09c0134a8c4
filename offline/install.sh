#!/bin/sh
# Installs the kit from this folder without a network: sh install.sh. PYTHON=python3.11 sh install.sh takes another Python.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --find-links wheelhouse kdlib
.venv/bin/kdlib reset
echo "Installed. Start with: .venv/bin/jupyter lab, and open notebooks/00_start_here.ipynb"
