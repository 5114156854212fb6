# Everything runs in .venv, which the first target sets up. PYTHON chooses the interpreter: 3.10 to 3.13, or a later one.
PYTHON ?= python3
BIN := .venv/bin
# Test processes, one thread each. 0: all tests in one process, in order.
WORKERS ?= 2

.PHONY: superflow test test-all test-slow test-lowest test-faults lint types wheel-check dist release-check claims checkpoints docs functional notebooks bench-lidar bench-logging size clean

superflow: .venv/installed  ## pretrain on the embedded driving world, a few minutes on two cores
	$(BIN)/lit fit --config configs/superflow.yaml

ifdef T
test: .venv/installed  ## make test T=<slug>: all that concerns one technique, of both tiers
	$(BIN)/python -m pytest -m "not slow" --technique $(T)
else
test: .venv/installed  ## what to run before every commit; make test T=<slug>: all that concerns one technique
	$(BIN)/python -m pytest -m "not slow and not thorough" -n $(WORKERS) --dist loadfile
endif

test-all: .venv/installed  ## what `make test` leaves out, but for the slow ones; see docs/testing.md
	$(BIN)/python -m pytest -m "thorough and not slow" -n $(WORKERS) --dist loadfile

test-slow: .venv/installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-lowest: .venv/installed  ## the tests of hostile files, with the oldest libraries that read them
	$(BIN)/pip install --quiet --no-deps --target build/lowest timm==1.0.15 pillow==10.0.0 pyyaml==6.0.1
	PYTHONPATH=$(CURDIR)/build/lowest $(BIN)/python -m pytest -m "not slow" tests/test_payloads.py tests/cli/test_current_folder.py tests/datamodules/test_reading.py

test-faults: .venv/installed  ## kill runs at random and at named points, and compare what they end with; about an hour
	$(BIN)/python -m pytest -m slow tests/test_faults.py tests/test_kills.py -s

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# static checkers follow an installed wheel, not the hook of an editable install
build/wheel: .venv/installed $(shell git ls-files lit_methods callbacks datamodules configs)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/pip install --quiet --no-deps --target build/wheel dist/*.whl

types: build/wheel
	MYPYPATH=build/wheel $(BIN)/mypy --config-file pyproject.toml -p lit_methods

wheel-check: build/wheel  ## the wheel, outside the repository: every module imports, every technique is listed
	cd / && PYTHONPATH=$(CURDIR)/build/wheel $(CURDIR)/$(BIN)/python $(CURDIR)/tests/check_wheel.py $(CURDIR)/build/wheel

dist: .venv/installed  ## sdist and wheel in dist/, checked as PyPI checks them, and the wheel made from the sdist
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/python -m twine check --strict dist/*

release-check: dist  ## the wheel in an empty environment: the command, the list, a short run
	$(PYTHON) -m venv --clear build/empty
	build/empty/bin/pip install --quiet dist/*.whl
	cd / && $(CURDIR)/build/empty/bin/lit --version && $(CURDIR)/build/empty/bin/lit list
	cd / && $(CURDIR)/build/empty/bin/lit fit --config configs/random_pruning.yaml --trainer.max_epochs 1 --run_root $(CURDIR)/build/runs

claims: .venv/installed  ## re-show every claim, and write docs/evidence.md; hours, but finished stages are kept
	$(BIN)/lit claims --jobs 2

checkpoints: .venv/installed  ## train the small models to share, into checkpoints/; about half an hour; make checkpoints N=tcm: one
	$(BIN)/python docs/tools/checkpoints.py $(N)

docs: .venv/installed  ## the site, in site/; a warning or a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

functional: .venv/installed  ## lit_methods/functional.pyi, from each core's __all__
	$(BIN)/python docs/tools/functional.py

notebooks: .venv/installed  ## run them all and keep their outputs
	$(BIN)/python notebooks/execute.py

bench-lidar: .venv/installed
	$(BIN)/python benchmarks/lidar.py

bench-logging: .venv/installed
	$(BIN)/python benchmarks/logging_cost.py

size: .venv/installed  ## lines of code, without blanks, comments and docstrings
	$(BIN)/python benchmarks/size.py

clean:
	rm -rf .venv build dist *.egg-info

.venv/installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 10) else f"lit-methods needs Python 3.10 or later, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@
