# make test, make bench: on a fresh clone they create .venv, install what they need and run.
# make test TORCH=torch==2.14.1: with another PyTorch, installed over the one in .venv.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Installed only where PyTorch brings no Triton of its own; its CPU builds don't.
TRITON ?= triton==3.9.0
# What we compare with, without what they require: an old PyTorch, which would replace ours. Of
# xformers only the masks work on a CPU; they are an oracle of the tests.
PEERS := open-flamingo==2.0.1 flamingo-pytorch==0.1.2 xformers==0.0.35
TEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed-$(shell echo '$(TORCH) $(TRITON) $(PEERS)' | cksum | cut -d' ' -f1)

# $(call timed,name,command): runs the command and prints its seconds.
timed = @start=$$(date +%s); { $(2); } && echo "$(1): $$(( $$(date +%s) - start )) s"

.DEFAULT_GOAL := check
.NOTPARALLEL:
.PHONY: check lint test bench aot install clean distclean

check: lint test

lint: $(STAMP)
	$(call timed,$@,$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy)

test: $(STAMP)
	$(call timed,$@,$(BIN)/python -m pytest -q -n auto $(TEST_ARGS))

# The suite has the same cases, for pytest-benchmark's users; a few of them show that it works.
SUITE := bench/suite -k '2048x2048 and bf16 and not compile' --benchmark-max-time 0.1

bench: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast bench $(BENCH_ARGS))
	$(call timed,suite,$(BIN)/python -m pytest -q $(SUITE) --benchmark-only)

aot: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast kernels)

install: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is not Python 3.10 or later; give one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) can't create virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@set -e; start=$$(date +%s); echo "install: $(TORCH) and the dev extra into $(VENV) ..."; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(PIP) install --no-warn-conflicts 'pip>=22.3' $(TORCH); \
	if [ -n "$(TRITON)" ] && [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'from importlib import metadata; \
	  raise SystemExit(not any(r.startswith("triton") for r in metadata.requires("torch")))'; \
	then $(PIP) install $(TRITON); fi; \
	$(PIP) install -e '.[dev]'; \
	$(PIP) install --no-deps $(PEERS); \
	rm -f $(VENV)/.installed-*; touch $@; \
	echo "install: $$(( $$(date +%s) - start )) s"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
