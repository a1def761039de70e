# The chores. `make demo` and `make test` set up all they need in .venv, given Python 3.11 or newer and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints-dev.txt
FAMILIES := z-image qwen-image
PROMPT := a red circle left of a blue square
TENSORRT_TESTS := tests/export/tensorrt $(wildcard tests/*/test_tensorrt*.py tests/*/test_compile*.py)
PICTURE := --height 256 --width 256 --num-inference-steps 8 --seed 0

.PHONY: demo test test-tensorrt check clean

demo: $(VENV)/.export
	@set -e; for family in $(FAMILIES); do \
	  $(BIN)/zimg-export demo-checkpoint demo/checkpoints/$$family --family $$family --overwrite; \
	  $(BIN)/zimg-export build --model demo/checkpoints/$$family --out demo/bundles/$$family --precision fp32 --overwrite; \
	  $(BIN)/zimg-run generate --bundle demo/bundles/$$family --prompt "$(PROMPT)" $(PICTURE) --output demo/$$family.png; \
	done

test: check $(VENV)/.tensorrt
	PYTHONPATH=$(VENV)/tensorrt $(BIN)/python -m pytest

# Every graph through a real TensorRT compiler, which needs no GPU; part of `make test`.
test-tensorrt: $(VENV)/.dev $(VENV)/.tensorrt
	PYTHONPATH=$(VENV)/tensorrt $(BIN)/python -m pytest $(TENSORRT_TESTS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p zimg
	$(BIN)/lint-imports

$(VENV)/.tensorrt: $(VENV)/.dev tests/tensorrt_compiler.py
	rm -rf $(VENV)/tensorrt
	$(BIN)/python tests/tensorrt_compiler.py $(VENV)/tensorrt
	touch $@

clean:
	rm -rf demo $(VENV)

# torch is named first and by its exact version, so that an index or a folder of wheels can offer its CPU build.
$(VENV)/.export: pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[export]'
	touch $@

$(VENV)/.dev: $(VENV)/.export
	$(PIP) --editable '.[dev]'
	touch $@
