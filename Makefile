# Everything a newcomer needs: make study, make test, make lab.
PYTHON ?= python3
PROFILE ?= workshop
OUT ?= runs/$(PROFILE)
SET ?=
CASES ?= 10000
KILLS ?= 100
RUNS ?= smoke
BIN = .venv/bin
# Jupyter refuses to run as root unless this is given. In a container one often is root.
ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
# Two files of tests run at a time. The tests of one file stay together, because they share what takes long to make.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: study test test-fast lint docs book rehearse fuzz soak bench gpu lab demo figures reset offline-bundle clean

study: .venv/ready
	$(BIN)/kdlib run --profile $(PROFILE) --out $(OUT) $(foreach s,$(SET),--set $(s))

test: .venv/ready
	$(PYTEST)

# The tests to run while you work.
test-fast: .venv/ready
	$(PYTEST) -m "not slow and not browser and not teacher"

# Style, types, the direction of imports, and notebooks without outputs.
lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb notebooks/*/*.ipynb

# Rewrites the table of parameters in docs/reference.md, then builds the pages in build/docs.
docs: .venv/docs
	$(BIN)/python docs/parameters.py
	$(BIN)/python -m sphinx --quiet docs build/docs
	@echo "open build/docs/index.html"

# The book of a run: its executed notebooks and the pages, as a site in build/book. OUT names the run.
book: .venv/docs
	$(BIN)/python docs/book.py --run $(OUT) --out build/book
	@echo "open build/book/index.html"

# Runs every stage, arm and objective of the paper's profile, small, against a stand-in hub.
rehearse: .venv/ready
	$(BIN)/python tests/harness/rehearse.py

# Gives hostile input to every reader: CASES cases each, and a share of them to the slow readers.
fuzz: .venv/ready
	$(BIN)/python tests/harness/fuzz.py --cases $(CASES)

# Kills a small study at KILLS random moments and compares each outcome. SEED=n repeats the same moments.
soak: .venv/ready
	$(BIN)/python tests/harness/soak.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

# Measures speed and memory against other libraries. It needs both cores for itself.
bench: .venv/ready
	$(BIN)/python -m benchmarks

# One table about distillation on this machine's GPU, in at most 6 minutes: benchmarks/gpu.json.
gpu: .venv/ready
	$(BIN)/python -m benchmarks.gpu

lab: .venv/ready
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 $(ROOT) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

# Voila's template asks another host for icons, which would keep a page waiting where there is no network.
OWN_STYLES = "--Voila.tornado_settings={'headers': {'Content-Security-Policy': \"style-src 'self' 'unsafe-inline'\"}}"

# A page to try teacher and student of the newest run on one's own sentences. Without a run it distils a small student.
demo: .venv/ready
	@ls runs/*/student/made.json > /dev/null 2>&1 || { \
		echo "no run has a student: distilling a small one (profile smoke), about two minutes"; \
		$(BIN)/kdlib distill --profile smoke; }
	$(BIN)/voila notebooks/07_try_the_student.ipynb --Voila.ip=127.0.0.1 --Voila.auto_token=True $(OWN_STYLES)

# Refreshes the figures, the kept results and the numbers in README and docs from a finished run.
figures: .venv/ready
	$(BIN)/kdlib figures --run $(OUT)
	$(BIN)/kdlib keep --run $(OUT)
	$(BIN)/kdlib readme --run results/$(notdir $(OUT))

# Restores the notebooks and removes the runs. What was there moves to set_aside/.
reset: .venv/ready
	$(BIN)/kdlib reset

# Collects all that machines of the same kind need to install without a network. RUNS names the runs to include.
BUNDLE = dist/kdlib-offline
offline-bundle: .venv/docs
	$(foreach run,$(RUNS),$(BIN)/kdlib run --profile $(run) --out runs/$(run) &&) true
	rm -rf $(BUNDLE) $(BUNDLE).tar
	mkdir -p $(BUNDLE)/handout
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt -w $(BUNDLE)/wheelhouse torch '.[notebooks]'
	$(BIN)/python docs/book.py --run runs/$(lastword $(RUNS)) --out build/book
	cp -r README.md LICENSE docs figures build/book offline/* $(BUNDLE)
	tar -c --exclude=cache --exclude=.lock --exclude=.ipynb_checkpoints notebooks results $(RUNS:%=runs/%) | tar -x -C $(BUNDLE)/handout
	tar -cf $(BUNDLE).tar -C dist kdlib-offline
	@du -sh $(BUNDLE)/* $(BUNDLE).tar

# pip shows its progress on a terminal and is quiet elsewhere.
INSTALL = if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	$(BIN)/python -m pip install $$quiet --disable-pip-version-check -c constraints.txt

# Set-up happens once, and again when pyproject.toml or constraints.txt changes.
.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv: about 2 minutes, 2 GB"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) torch
	@$(INSTALL) -e '.[dev]'
	@touch $@

.venv/docs: .venv/ready
	@echo "adding what builds the documentation to .venv"
	@$(INSTALL) -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv build runs benchmarks/.venvs benchmarks/.work
