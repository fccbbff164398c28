# make quickstart       install into .venv, train a small model on Python's own source code, sample from it
# make test             install, then run the linter and the tests
# make slow             the tests that take minutes
# make numerics         the tests that compare numbers, under the arithmetic of other processors (an hour)
# make mutants          change the program in 300 places, one at a time, and list the changes that no test notices (hours)
# make tritons          kernel tests with the oldest and the newest Triton, each installed into build/
# make compile-report   write docs/compile_report.md (minutes; needs no GPU)
# docs/testing.md says more. PYTHON=python3.12 picks the interpreter; 3.11 and 3.12 are supported.

OK_VERSION = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(OK_VERSION)' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test slow numerics mutants tritons compile-report lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/python train.py configs/quickstart.toml --overwrite
	$(BIN)/python sample.py runs/quickstart --prompt "def " --max-new-tokens 800 --rolling

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 -q

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

numerics: $(VENV)/.installed
	$(BIN)/python -m tests.numerics --workers 2

mutants: $(VENV)/.installed
	$(BIN)/python -m tests.mutate --mutants 300 --workers 2

# Triton 3.6's interpreter fails with numpy from 2.4 on.
build/triton-3.6.0: NUMPY = "numpy<2.4"
build/triton-%: $(VENV)/.installed
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$* $(NUMPY)
	mv $@.part $@

tritons: build/triton-3.6.0 build/triton-3.9.0
	for folder in $^; do echo "with $$folder"; PYTHONPATH=$(CURDIR)/$$folder $(BIN)/python -m pytest -n 2 -q \
		tests/test_attention_features.py tests/test_attention_torch.py tests/test_kernels_compile.py || exit 1; done

compile-report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compile_report --write docs/compile_report.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and neither was found: install one, or run make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache
