# The chores. `make demo` and `make test` set up all they need in .venv, given Python 3.11 or newer and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints-dev.txt
FAMILIES := z-image qwen-image
PROMPT := a red circle left of a blue square
PICTURE := --height 256 --width 256 --num-inference-steps 8 --seed 0

.PHONY: demo test check clean

demo: $(VENV)/.export
	@set -e; for family in $(FAMILIES); do \
	  $(BIN)/zimg-export demo-checkpoint demo/checkpoints/$$family --family $$family --overwrite; \
	  $(BIN)/zimg-export build --model demo/checkpoints/$$family --out demo/bundles/$$family --precision fp32 --overwrite; \
	  $(BIN)/zimg-run generate --bundle demo/bundles/$$family --prompt "$(PROMPT)" $(PICTURE) --output demo/$$family.png; \
	done

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p zimg
	$(BIN)/lint-imports

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
