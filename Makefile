# Ringback: the commands of a checkout. `make help` lists them. No root is needed.

SHELL := /bin/bash
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.tools/bin:$(PATH)

# `make demo PROFILE=release` and so on; a release build takes about twice as long and runs much faster.
PROFILE ?= dev
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
RINGBACK := $(TARGET_DIR)/$(if $(filter release,$(PROFILE)),release,debug)/ringback
PYTHON ?= python3
# Crash points are compiled into the program that the tests kill, and into no other.
TEST_BUILD := --workspace --features ringback/faults

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Fetch what demo and tests need into .tools/ (nats-server, RunPod SDKs, verifier)
	@$(PYTHON) tools/setup

.PHONY: setup-nats
setup-nats:
	@$(PYTHON) tools/setup nats

.PHONY: model
model: ## Fetch the text encoder all-MiniLM-L6-v2 into .tools/models/ (for `builtin:encoder`)
	@$(PYTHON) tools/setup model

.PHONY: build
build: ## Build the program `ringback` (PROFILE=release for speed)
	@cargo build --profile $(PROFILE) -p ringback

.PHONY: dev
dev: setup-nats build ## Start everything in one process (ARGS='--endpoint ...' for more)
	@$(RINGBACK) dev $(ARGS)

.PHONY: demo
demo: ## Sentences to speech through everything: set up, build, run a batch, verify webhooks and audio
	@$(PYTHON) tools/setup demo
	@test -x $(RINGBACK) || echo "demo: the first build takes some minutes (5 minutes of processor time)" >&2
	@$(MAKE) --no-print-directory build
	@.tools/venv-demo/bin/python examples/demo/run.py --ringback $(RINGBACK) $(ARGS)

.PHONY: test
test: ## Run all tests (real brokers, databases, SDKs; FILTER='-E ...' or names for some)
	@$(PYTHON) tools/setup test
	@cargo build $(TEST_BUILD) --all-targets
	@if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run $(TEST_BUILD) $(if $(CI),--profile ci) $(FILTER); \
	else \
		echo "cargo-nextest is not installed; using cargo test" >&2; \
		cargo test $(TEST_BUILD) $(FILTER) -- --test-threads 2; \
	fi

.PHONY: lint
lint: ## Check format, lints and (where cargo-deny is installed) licences and advisories
	@cargo fmt --all -- --check
	@cargo clippy $(TEST_BUILD) --all-targets -- -D warnings
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check; \
	else echo "cargo-deny is not installed; deny.toml is not checked" >&2; fi

.PHONY: fmt
fmt: ## Format the code
	@cargo fmt --all

.PHONY: bench
bench: setup-nats ## Measure the whole way and the floor beside it (the profile of images and packages)
	@cargo build --profile dist -p ringback -p ringback-bench
	@$(TARGET_DIR)/dist/ringback-bench --ringback $(TARGET_DIR)/dist/ringback $(ARGS)

.PHONY: bench-webhooks
bench-webhooks: setup-nats ## Measure the dispatcher alone, count 100,000 webhooks under kills, owe a million, good receivers beside bad ones
	@cargo build --profile dist -p ringback-webhook-dispatcher -p ringback-bench
	@$(TARGET_DIR)/dist/ringback-count speed
	@$(TARGET_DIR)/dist/ringback-count neighbours
	@$(TARGET_DIR)/dist/ringback-count count
	@$(TARGET_DIR)/dist/ringback-count owed

.PHONY: bench-inference
bench-inference: ## Measure the CPU engine beside onnxruntime: tokens per CPU second
	@$(PYTHON) tools/setup model onnx
	@cargo build --profile dist -p ringback-bench --bin ringback-encode
	@$(TARGET_DIR)/dist/ringback-encode $(ARGS)

# Looked for before anything is built: without it nothing of what follows can run.
.PHONY: need-gpu
need-gpu:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || { \
		echo "this needs an NVIDIA GPU and its driver: libcuda.so.1 is not here" >&2; exit 2; }

.PHONY: test-gpu
test-gpu: need-gpu ## Test the GPU engine on this host's GPU (RINGBACK_CUDA_LIBRARIES: folders with NVRTC and cublasLt)
	@$(PYTHON) tools/setup model nvrtc
	@RINGBACK_NEED_GPU=1 cargo test -p ringback-inference-cuda --lib -- --nocapture --test-threads 1 on_gpu

# One kernel after the other under each tool; --error-exitcode makes a finding a failure.
.PHONY: sanitize-gpu
sanitize-gpu: need-gpu ## Run the GPU kernels under compute-sanitizer
	@command -v compute-sanitizer >/dev/null || { \
		echo "compute-sanitizer is not on the path: it comes with the CUDA toolkit" >&2; exit 2; }
	@$(PYTHON) tools/setup nvrtc
	@set -o pipefail; \
	program=$$(cargo test -p ringback-inference-cuda --lib --no-run --message-format=json \
		| $(PYTHON) -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])') && \
	for tool in memcheck racecheck initcheck synccheck; do \
		RINGBACK_NEED_GPU=1 compute-sanitizer --tool $$tool --error-exitcode 1 $$program --nocapture --exact \
			tests::on_gpu::each_kernel_equals_the_reference || exit 1; \
	done

.PHONY: bench-gpu
bench-gpu: need-gpu ## Measure the GPU engine (ARGS='--python python3' measures sentence-transformers beside it)
	@$(PYTHON) tools/setup model nvrtc
	@cargo build --profile dist -p ringback-inference-cuda --example ringback-encode-gpu
	@$(TARGET_DIR)/dist/examples/ringback-encode-gpu \
		$(foreach folder,$(subst :, ,$(RINGBACK_CUDA_LIBRARIES)) $(wildcard .tools/venv-nvrtc/lib/python3*/site-packages/nvidia/cu13/lib),--library-dir $(folder)) $(ARGS)

.PHONY: clean
clean: ## Remove builds, fetched tools and demo data
	@cargo clean
	@rm -rf .tools .ringback
