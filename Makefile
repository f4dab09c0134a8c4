# Everything a newcomer needs: make study, make test, make lab.
PYTHON ?= python3
PROFILE ?= workshop
OUT ?= runs/$(PROFILE)
SET ?=
CASES ?= 10000
BIN = .venv/bin
# In a container one is often root, which Jupyter wants to be told.
ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: study test rehearse fuzz bench lab figures clean

study: .venv/ready
	$(BIN)/kdlib run --profile $(PROFILE) --out $(OUT) $(foreach s,$(SET),--set $(s))

test: .venv/ready
	$(BIN)/python -m pytest

# The paper's profile, every stage, arm and objective, small, against a stand-in hub.
rehearse: .venv/ready
	$(BIN)/python tests/rehearse.py

# Hostile input for every reader: so many cases each, slow readers a share of them.
fuzz: .venv/ready
	$(BIN)/python tests/fuzz.py --cases $(CASES)

# Every measurement beside what else there is, peers in environments of their own; alone on the machine, it wants both cores.
bench: .venv/ready
	$(BIN)/python -m benchmarks

lab: .venv/ready
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(ROOT) notebooks

figures: .venv/ready
	$(BIN)/kdlib figures --run $(OUT)

# Set-up happens once, and again when what is to be installed changes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv runs benchmarks/.venvs benchmarks/.work
