# Every target but gpu does its own set-up and works again without reinstalling.
# ARGS goes to the command a target runs:  make portable ARGS="-k packed"

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

# The oldest supported Triton, laid over the environment: torch is the same in both.
OLD_TRITON := 3.6.0
OVERLAY    := $(VENV)/triton-$(OLD_TRITON)

# Two workers of one thread each: the tests are many and small.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

.NOTPARALLEL:
.PHONY: help setup test quick lint portable interpreted aot-old-triton fuzz bench gpu format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make or update the virtual environment
# Without its stamp an environment is half made and starts anew; with it, an update is enough.
$(READY): pyproject.toml constraints.txt
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	rm -f $@
	$(PY) -m pip install --quiet -c constraints.txt -e '.[bench,dev,models,profiling]'
	touch $@

test: lint portable interpreted aot-old-triton ## all that continuous integration runs

quick: lint ## style, types and the tests nearest to what changed against main, in two minutes
	$(PYTEST) -m 'not slow and not aot' $$($(PY) tests/quick.py) $(ARGS)

lint: $(READY) ## check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

portable: $(READY) ## the suite on PyTorch's own operators; GPU tests too where there is one
	env -u TRITON_INTERPRET $(PYTEST) $(ARGS)

interpreted: $(READY) ## the suite on the Triton kernels, interpreted
	TRITON_INTERPRET=1 $(PYTEST) -m 'not portable_only and not aot' $(ARGS)

aot-old-triton: $(OVERLAY)/.ready ## compile the kernels ahead of time under the oldest Triton
	env -u TRITON_INTERPRET PYTHONPATH=$(OVERLAY) $(PYTEST) -m aot tests/aot $(ARGS)

$(OVERLAY)/.ready: | $(READY)
	rm -rf $(OVERLAY)
	$(PY) -m pip install --quiet --no-deps --target $(OVERLAY) triton==$(OLD_TRITON)
	touch $@

MINUTES ?= 10
fuzz: $(READY) ## random layouts for MINUTES=10, from SEED if given
	TRITON_INTERPRET=1 $(PY) tests/kernels/attention/fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(READY) ## time our kernels against PyTorch's, write a table, results and plots
	$(PY) -m vidgen.cli bench $(ARGS)

# A GPU machine keeps its own PyTorch: run from the source tree, install nothing.
gpu: ## on a GPU machine: STAGE=test|bench|tune|profile
	PYTHONPATH=kernels:. $(PYTHON) bench/gpu/stages.py $(STAGE) $(ARGS)

format: $(READY) ## rewrite the code in the common format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove build output, caches and a CPU's benchmark results, keep the environment
	rm -rf build dist *.egg-info kernels/*.egg-info
	rm -rf .benchmarks .pytest_cache .ruff_cache bench/results/cpu
	find bench kernels profiling tests vidgen -name __pycache__ -prune -exec rm -rf {} +
