# The chores. `make demo` and `make test` set up all they need in .venv, given Python 3.11 or newer and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REFERENCES ?= $(VENV)/references
INSTALL := -m pip --disable-pip-version-check install --quiet --constraint constraints-dev.txt
PIP := $(BIN)/python $(INSTALL)
TENSORRT_TESTS := tests/export/compilers tests/export/cli/test_compile.py tests/engines/tensorrt tests/engines/onnxruntime/test_tensorrt_rtx.py

.PHONY: demo test test-tensorrt references plugins check clean

# A dozen prompts by the two models that zimgkit carries, side by side, pictures that they change, and edges and regions
# that they follow. Needs no PyTorch.
demo: $(VENV)/.run
	mkdir -p demo
	$(BIN)/zimg-run sheet docs/demo-prompts.txt --bundle zimg-tiny-z --bundle zimg-tiny-qwen --output demo/sheet.png
	$(BIN)/zimg-run sheet docs/demo-pictures.csv --bundle zimg-tiny-z --bundle zimg-tiny-qwen --columns 2 --output demo/pictures.png
	$(BIN)/zimg-run sheet docs/demo-edits.csv --bundle zimg-tiny-qwen-edit --columns 2 --output demo/edits.png
	$(BIN)/zimg-run sheet docs/demo-controls.csv --bundle zimg-tiny-z --bundle zimg-tiny-qwen --columns 2 --output demo/controls.png
	$(BIN)/zimg-export swap-lora zimg-tiny-qwen --lora zimg-tiny-qwen-eligen --out demo/regions --overwrite --quiet
	$(BIN)/zimg-run sheet docs/demo-regions.csv --bundle demo/regions --columns 2 --output demo/regions.png

test: check $(VENV)/.tensorrt
	PYTHONPATH=$(VENV)/tensorrt $(BIN)/python -m pytest

# Every graph through a real TensorRT compiler, which needs no GPU; part of `make test`.
test-tensorrt: $(VENV)/.dev $(VENV)/.tensorrt
	PYTHONPATH=$(VENV)/tensorrt $(BIN)/python -m pytest $(TENSORRT_TESTS)

# What the tests hold DiffSynth-Studio to draw, drawn by it anew: an environment of its own, of 1.5 GB.
references: $(REFERENCES)/.installed
	HF_HUB_OFFLINE=1 $(REFERENCES)/bin/python -m tests.references.record

# The kernels of plugins/, compiled anew: needs no GPU, but Triton, which is 0.9 GB.
plugins: $(VENV)/.kernels
	$(BIN)/python -m zimgkit.plugins.compile

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p zimgkit
	$(BIN)/lint-imports

$(VENV)/.tensorrt: $(VENV)/.dev tests/tensorrt_compiler.py
	rm -rf $(VENV)/tensorrt
	$(BIN)/python tests/tensorrt_compiler.py $(VENV)/tensorrt
	touch $@

clean:
	rm -rf demo $(VENV)

$(VENV)/.run: pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[lora]'
	touch $@

# torch is named first and by its exact version, so that an index or a folder of wheels can offer its CPU build.
$(VENV)/.export: $(VENV)/.run
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[export]'
	touch $@

$(VENV)/.dev: $(VENV)/.export
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.kernels: $(VENV)/.export
	$(PIP) --editable '.[kernels]'
	touch $@

# DiffSynth's own requirements would bring another torch; torchvision's likewise.
$(REFERENCES)/.installed: constraints-dev.txt
	test -x $(REFERENCES)/bin/python || $(PYTHON) -m venv $(REFERENCES)
	$(REFERENCES)/bin/python $(INSTALL) torch==2.13.0
	$(REFERENCES)/bin/python $(INSTALL) --no-deps torchvision==0.28.0 diffsynth==2.1.12
	$(REFERENCES)/bin/python $(INSTALL) accelerate diffusers einops ftfy imageio modelscope numpy pandas peft pillow \
		safetensors transformers
	touch $@
