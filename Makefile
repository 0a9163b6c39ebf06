# `make run`: the main job, from nothing to a solved task. `make test`: the tests.
# `make test-nightly`: the tests against TorchRL's development branch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NIGHTLY := .venv-nightly

SEED ?= 0
WORKERS ?= 2
EPISODES ?= 160
DATASET := cube-single-play-v0

.PHONY: run test test-nightly lint format setup renderer clean

run: setup renderer
	$(BIN)/torchrl-mac-data generate $(DATASET) --episodes $(EPISODES) --seed 0 --workers $(WORKERS) --out data
	$(BIN)/python examples/mac.py preset=cpu seed=$(SEED)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-nightly: $(NIGHTLY)/.installed
	OMP_NUM_THREADS=1 $(NIGHTLY)/bin/python -m pytest -n 2 --dist loadfile \
	  --upstream-failures test/nightly_failures.txt

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# As above, and then the nightly pair in the place of the releases, which it shares import names with.
$(NIGHTLY)/.installed: setup.py constraints.txt constraints-nightly.txt
	$(PYTHON) -m venv --clear $(NIGHTLY)
	$(NIGHTLY)/bin/python -m pip install --quiet --upgrade pip
	$(NIGHTLY)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(NIGHTLY)/bin/python -m pip uninstall --quiet --yes tensordict torchrl
	$(NIGHTLY)/bin/python -m pip install --quiet --constraint constraints.txt --requirement constraints-nightly.txt
	touch $@

# Videos need an off-screen OpenGL. Without it everything else works.
renderer:
	@ldconfig -p 2>/dev/null | grep -q libEGL || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  apt-get install -qq -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri >/dev/null; } || \
	echo "No EGL library: no video. On Debian: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"

clean:
	rm -rf $(VENV) $(NIGHTLY) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
