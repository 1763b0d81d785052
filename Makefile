# Two commands on a fresh machine with Python >= 3.10, a C++ compiler and make: `make test` and `make demo`.
# VENV is where everything is installed, WORKERS how many processes test; PYZO_CUDA and PYZO_ARCHS are setup.py's.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYZO_ARCHS ?= 90
export PYZO_ARCHS

bin := $(VENV)/bin
native := setup.py pyproject.toml $(shell find csrc -type f -not -path 'csrc/tests/*')

.PHONY: build test demo lint clean

build: $(VENV)/.built

test: build
	$(bin)/python -m pytest -n $(WORKERS)

demo: build
	$(bin)/python bench/demo.py

lint: $(VENV)/.requirements
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(bin)/clang-format --dry-run -Werror

clean:
	rm -rf build $(VENV) *.egg-info pyzo/*.so pyzo/_build.json

$(VENV)/.requirements: dev-requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet -r dev-requirements.txt
	touch $@

# Without isolation: the libraries are built against the torch that was just installed.
$(VENV)/.built: $(VENV)/.requirements $(native)
	$(bin)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@
