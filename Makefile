# Everything happens in the project's own .venv; `make` alone lists the targets.

PYTHON ?= python3
# The engine to install: the CUDA build where a GPU answers, else the CPU build.
ENGINE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

BIN := .venv/bin
PINS := requirements/$(ENGINE).txt
PACKAGES := .venv/.packages-$(ENGINE)
EXTENSION := .venv/.extension
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

export VIRTUAL_ENV := $(CURDIR)/.venv
unexport PYTHONPATH PYTHONHOME

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Run the main job on a real model: convert, train, serve, merge
	@$(BIN)/qpack demo

# Processes that the Python tests are dealt to: see tests/conftest.py.
WORKERS ?= 2

.PHONY: test
test: setup ## Run all tests
	@cargo test --quiet
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: lint
lint: setup ## Check formatting, lints, types and stubs
	cargo fmt --check
	cargo clippy --quiet --all-targets -- --deny warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest qpack._core

.PHONY: bench
bench: setup ## Run the benchmarks
	cargo bench --quiet
	$(BIN)/python -m pytest benches

SOAK_SECONDS ?= 600

.PHONY: soak
soak: setup ## Serve under load and swaps for SOAK_SECONDS; fail on one wrong answer, or on growth
	@PYTHONPATH=tests $(BIN)/python -m soak --seconds $(SOAK_SECONDS)

# Seconds for each fuzz target.
FUZZ_SECONDS ?= 20

.PHONY: fuzz
fuzz: ## Fuzz what is read from files of others, a while each
	@cargo fuzz --version >/dev/null 2>&1 || cargo install --quiet --locked cargo-fuzz
	@for target in header index quant_state; do \
		mkdir -p rust/fuzz/corpus/$$target; \
		log=$$(RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir rust/fuzz --sanitizer none $$target \
			rust/fuzz/corpus/$$target rust/fuzz/seeds/$$target -- -max_total_time=$(FUZZ_SECONDS) 2>&1) || \
			{ echo "$$log"; exit 1; }; \
		echo "$$target: $$(echo "$$log" | sed -n 's/^Done //p')"; \
	done

.PHONY: wheel
wheel: setup ## Build an abi3 wheel into dist/
	@$(BIN)/maturin build --release --quiet --out dist
	@ls dist/*.whl

.PHONY: pins
pins: $(BIN)/uv ## Resolve requirements/*.txt anew from pyproject.toml
	@sh requirements/resolve.sh $(BIN)/uv

.PHONY: clean
clean: ## Remove everything that was built, installed or downloaded
	rm -rf .venv target dist demo-run qpack/*.so

.PHONY: setup
setup: $(EXTENSION) ## Install everything into .venv

$(EXTENSION): $(PACKAGES) $(RUST) pyproject.toml
	@echo "building the Rust extension" >&2
	@log=$$($(BIN)/maturin develop --release --uv 2>&1) || { echo "$$log" >&2; exit 1; }
	@touch $@

$(PACKAGES): $(BIN)/uv $(PINS)
	@echo "installing $(PINS)" >&2
	@$(BIN)/uv pip install --quiet --no-deps --requirement $(PINS)
	@rm -f .venv/.packages-* && touch $@

$(BIN)/uv:
	@sh requirements/check-tools.sh $(PYTHON)
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
