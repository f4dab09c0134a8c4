# Everything a newcomer needs: make study, make test, make lab.
PYTHON ?= python3
PROFILE ?= workshop
OUT ?= runs/$(PROFILE)
SET ?=
CASES ?= 10000
KILLS ?= 100
RUNS ?= smoke
BIN = .venv/bin
# In a container one is often root, which Jupyter wants to be told.
ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: study test rehearse fuzz soak bench lab figures reset offline-bundle clean

study: .venv/ready
	$(BIN)/kdlib run --profile $(PROFILE) --out $(OUT) $(foreach s,$(SET),--set $(s))

# Two files of tests at a time; the tests of one file stay together, since they share what takes long to make.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The paper's profile, every stage, arm and objective, small, against a stand-in hub.
rehearse: .venv/ready
	$(BIN)/python tests/harness/rehearse.py

# Hostile input for every reader: so many cases each, slow readers a share of them.
fuzz: .venv/ready
	$(BIN)/python tests/harness/fuzz.py --cases $(CASES)

# A small study killed at so many random moments, each time to the same end; SEED=n for the same moments again.
soak: .venv/ready
	$(BIN)/python tests/harness/soak.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

# Every measurement, beside what else there is; wants both cores for itself.
bench: .venv/ready
	$(BIN)/python -m benchmarks

lab: .venv/ready
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(ROOT) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

figures: .venv/ready
	$(BIN)/kdlib figures --run $(OUT)

# Back to the start: notebooks as they were handed out, no runs. What was there moves to set_aside/.
reset: .venv/ready
	$(BIN)/kdlib reset

# All that machines of this one's kind need to install without a network; RUNS are the finished runs that go with it.
BUNDLE = dist/kdlib-offline
offline-bundle: .venv/ready
	$(foreach run,$(RUNS),$(BIN)/kdlib run --profile $(run) --out runs/$(run) &&) true
	rm -rf $(BUNDLE) $(BUNDLE).tar
	mkdir -p $(BUNDLE)/handout
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt -w $(BUNDLE)/wheelhouse torch .
	cp -r README.md docs figures offline/* $(BUNDLE)
	tar -c --exclude=cache --exclude=.lock --exclude=.ipynb_checkpoints notebooks $(RUNS:%=runs/%) | tar -x -C $(BUNDLE)/handout
	tar -cf $(BUNDLE).tar -C dist kdlib-offline
	@du -sh $(BUNDLE)/* $(BUNDLE).tar

# Set-up happens once, and again when what is to be installed changes.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv runs benchmarks/.venvs benchmarks/.work
