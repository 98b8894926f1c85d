# make test, make bench: on a fresh clone they create .venv, install what they need and run.
# make test TORCH='torch==2.13.0 torchvision==0.28.0': with others, installed over those in .venv.
# make test-transformers VERSION=4.57.1: what patches models of transformers, with another of those.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
# The goldens' (kernels/goldens), in place of the one that PyTorch brings. It only compiles here, or
# interprets. `TRITON=` leaves PyTorch's.
TRITON ?= triton==3.9.0
# More that is to have a certain version.
PINS ?=
# What we compare with, without what they require: another PyTorch or Triton, which would replace
# ours. Of xformers only the masks work on a CPU; they are an oracle of the tests. Liger's patch of
# transformers' models meets ours.
PEERS := open-flamingo==2.0.1 flamingo-pytorch==0.1.2 xformers==0.0.35 liger-kernel==0.8.5
TEST_ARGS ?=
# The oldest transformers whose models are patched; `make test` has the newest. An environment's
# VERSION is something else's.
VERSION := 4.57.1
# Of the kernels' and layouts' many cases one of so many runs, others at each commit; 1: all.
TEST_SAMPLE ?= 6
BENCH_ARGS ?=
# Hugging Face's library that `export-kernels` writes for, beside the environment: in it,
# transformers would use it.
HUB := kernels==0.17.2

# Where it is set, every process of the tests compiles what it imports of the checkout anew: to
# collect them takes 16 s, not 11.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed-$(shell echo '$(TORCH) $(TRITON) $(PINS) $(PEERS) $(HUB)' | cksum | cut -d' ' -f1)
OTHER := $(VENV)-transformers-$(VERSION)
OTHER_PIP := $(OTHER)/bin/python -m pip --disable-pip-version-check -qq

# $(call timed,name,command): runs the command and prints its seconds.
timed = @start=$$(date +%s); { $(2); } && echo "$(1): $$(( $$(date +%s) - start )) s"

.DEFAULT_GOAL := check
ifndef BESIDE
.NOTPARALLEL:
endif
.PHONY: check lint docs test coverage test-transformers test-lowest test-nsys accept-cpu verify verify-collected bench bench-full bench-pytest aot demo gpu gpu-test install clean distclean

# First what is one process of one thread each, two at a time, the longest first; then what takes all
# cores.
check: $(STAMP) $(OTHER)/.installed
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 --output-sync=target BESIDE=1 WORKERS=0 \
	  accept-cpu test-transformers lint docs test-nsys
	@$(MAKE) --no-print-directory test verify-collected

lint: $(STAMP)
	$(call timed,$@,$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && \
	  $(BIN)/lint-imports)

# How tests ended, for verify-collected.
JUNIT := build/junit
# Of tests that run side by side; one that is done takes over some of another's.
WORKERS ?= auto
XDIST := -n $(WORKERS) --dist worksteal

# The site of docs/, into build/site; reads nothing from the net, and a warning is an error: but
# with --quiet mkdocs would count none.
docs: $(STAMP)
	$(call timed,$@,NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build)

test: $(STAMP)
	@rm -f $(JUNIT)/test.xml
	$(call timed,$@,$(BIN)/python -m pytest -q $(XDIST) --sample $(TEST_SAMPLE) \
	  --junitxml $(JUNIT)/test.xml $(TEST_ARGS))

# Lines that `make test` runs, in its processes too: fails under 90 %.
coverage: $(STAMP)
	$(call timed,$@,$(BIN)/python -m pytest -q $(XDIST) --sample $(TEST_SAMPLE) --cov --cov-report=term \
	  --cov-report=html:build/coverage $(TEST_ARGS))

test-transformers: $(OTHER)/.installed
	$(call timed,$@ $(VERSION),$(OTHER)/bin/python -m pytest -q $(XDIST) --sample $(TEST_SAMPLE) \
	  $(filter-out %_bench.py,$(wildcard tests/test_patch*.py)) $(TEST_ARGS))

# The oldest of all three that are supported, in an environment of its own: a job beside `check`.
# Triton 3.6's interpreter makes scalars of arrays as NumPy 2.4 refuses to.
test-lowest:
	@$(MAKE) --no-print-directory VENV=$(VENV)-lowest JUNIT=build/junit-lowest \
	  TORCH='torch==2.11.0 torchvision==0.26.0' TRITON=triton==3.6.0 PINS='transformers==$(VERSION) numpy==2.2.6' test

# Nsight Systems from Debian, unpacked beside; with it comes a libcuda that has no driver. Where it
# can't be had the reason is printed, and that is all.
NSYS := build/nsys

test-nsys: $(STAMP)
	@rm -f $(JUNIT)/nsys.xml
	$(call timed,$@,profiling/install_nsys.sh $(NSYS) || test $$? = 3 && { test ! -f $(NSYS)/env || \
	  { . $(NSYS)/env && $(BIN)/python -m pytest -q --junitxml $(JUNIT)/nsys.xml tests/test_nsys.py \
	    $(TEST_ARGS); }; })

# Every promise of docs/promises beside what shows it, whose tests run: nearly all of them. The
# second takes what `make test` found, in seconds.
VERIFY_ARGS ?=

verify: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast verify $(VERIFY_ARGS) -- $(XDIST) --sample $(TEST_SAMPLE))

verify-collected: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast verify --junit $(JUNIT) $(VERIFY_ARGS))

# Table 3 at a small scale and one case of each family: 12 to 33 minutes on 2 cores.
bench: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast bench table3 headline $(BENCH_ARGS))

# Everything: hours.
bench-full: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast bench all $(BENCH_ARGS))

# The same cases for pytest-benchmark's users: BENCH_ARGS='--benchmark-autosave', and another time
# BENCH_ARGS=--benchmark-compare. SUITE= is all of them.
SUITE ?= -k '(2048x2048 or 4x256x5x8x64x64 or 1x1x32x1024x1024 or micro) and fp32 and not compile'

bench-pytest: $(STAMP)
	$(call timed,$@,$(BIN)/python -m pytest -q bench/suite --benchmark-only $(SUITE) $(BENCH_ARGS))

aot: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast kernels)

# A small model learns to caption digits in a few minutes; exits with 1 if it doesn't.
DEMO_OUT ?= build/demo

demo: $(STAMP)
	$(call timed,$@,$(BIN)/flamingo-fast demo --fresh --out $(DEMO_OUT))

# What a CPU can run of `make gpu`, kernels interpreted: no line of it runs for the first time there.
ACCEPT_CPU_OUT ?= build/accept-cpu

accept-cpu: $(STAMP)
	@rm -rf $(ACCEPT_CPU_OUT)
	$(call timed,$@,$(BIN)/flamingo-fast accept --device cpu --quick --out $(ACCEPT_CPU_OUT))

# On a machine with a GPU, with what PYTHON has installed, under 25 minutes: a pass/fail table, and a
# folder to keep. GPU_ARGS='--stage doctor --stage parity --out DIR', then '--resume --out DIR'.
GPU_ARGS ?=

gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m flamingo_fast.profiling.accept $(GPU_ARGS)

# The kernels' and modules' tests there, many more cases than `gpu` has; needs pytest-xdist.
GPU_JOBS ?= 8
GPU_TEST_ARGS ?=
GPU_TESTS := $(addprefix tests/test_,$(addsuffix .py,gpu tanh norm gated_residual feed_forward \
  latent_attention latent_kernels masked_cross_attention several_media gated_blocks resampler \
  op_contract unbind_kv gpu_models))

gpu-test:
	$(call timed,$@,TEST_DEVICE=cuda PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m pytest -q -n $(GPU_JOBS) \
	  --dist worksteal $(GPU_TESTS) \
	  -k 'triton or kernels or tanh or gpu or gated_blocks or resampler' $(GPU_TEST_ARGS))

install: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is not Python 3.10 or later; give one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) can't create virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@set -e; start=$$(date +%s); echo "install: $(TORCH) and the dev extra into $(VENV) ..."; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(PIP) install --no-warn-conflicts 'pip>=22.3' $(TORCH); \
	$(PIP) install -e '.[dev]' $(TORCH) $(PINS); \
	$(PIP) install --no-deps $(PEERS); \
	$(PIP) install --no-deps --upgrade --target $(VENV)/hub $(HUB); \
	if [ -n "$(TRITON)" ] && [ "$$(uname -s)" = Linux ]; then $(PIP) install --no-deps $(TRITON); fi; \
	rm -f $(VENV)/.installed-*; touch $@; \
	echo "install: $$(( $$(date +%s) - start )) s"

# Of its own it has transformers and what that needs in other versions; the rest, above all PyTorch,
# is $(VENV)'s, whose folder comes behind its own in sys.path. pip changes nothing there.
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

$(OTHER)/.installed: $(STAMP)
	@set -e; start=$$(date +%s); echo "install: transformers $(VERSION) into $(OTHER) ..."; \
	$(BIN)/python -m venv --clear --without-pip $(OTHER); \
	rest=$$($(BIN)/python -c '$(SITE)'); own=$$($(OTHER)/bin/python -c '$(SITE)'); \
	echo "import site; site.addsitedir('$$rest')" > "$$own/rest.pth"; \
	$(OTHER_PIP) install --no-warn-conflicts transformers==$(VERSION); \
	touch $@; echo "install: $$(( $$(date +%s) - start )) s"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-*
