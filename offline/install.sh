#!/bin/sh
# Installs the kit from this folder without a network: sh install.sh
# To choose another Python: PYTHON=python3.11 sh install.sh
set -eu
cd "$(dirname "$0")"
echo "setting up .venv: about 2 minutes, 2 GB"
"${PYTHON:-python3}" -m venv .venv
if [ -t 1 ]; then quiet=; else quiet=--quiet; fi
.venv/bin/python -m pip install $quiet --disable-pip-version-check --no-index --find-links wheelhouse 'kdlib[notebooks]'
.venv/bin/kdlib reset
echo "Installed. Start with: .venv/bin/jupyter lab, and open notebooks/00_start_here.ipynb"
