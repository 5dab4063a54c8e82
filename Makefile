# make run      sets up what is missing and runs a MoE layer across processes; ARGS="--model ... --ranks ..."
# make test     C++ tests (plain, ThreadSanitizer, AddressSanitizer + UBSan), CUDA, then pytest; PYTEST_ARGS="-k ..."
# make cuda     builds the CUDA half for every architecture, checks its machine code, and loads it; needs no GPU
# make verify   the protocol's model, exhaustively (needs the model checker `spin`)
# make bench    everything there is to measure here, with pictures and a page, into BENCH_OUT (build/bench/)
# make bench-micro  what a call is made of; MICRO_ARGS="-k ... --json FILE"
# make bench-cpp    the C++ benches, into build/cpp-plain/
# make build    the extension alone
# make clean    removes what was built, keeps the virtual environment
#
# PYTHON is the interpreter that the virtual environment VENV is made from. Stamp files make a second call quick.

PYTHON ?= python3
VENV ?= .venv
BENCH_OUT ?= build/bench

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Each step uses all cores by itself, and the tests measure time.
.NOTPARALLEL:
.PHONY: run test test-cpp test-python cuda verify build bench bench-micro bench-cpp clean

STARTED := $(shell date +%s)
section = @printf '\n== %3d s  %s\n' $$(($$(date +%s) - $(STARTED))) '$(1)'

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*.cmake) flashmoe/_version.py \
                $(shell find csrc -type f)

run: build
	$(BIN)/flashmoe run $(ARGS)

test: test-cpp cuda test-python

build: $(VENV)/.flashmoe

$(VENV)/.requirements: requirements.txt
	$(call section,Python environment $(VENV))
	tools/check_machine.sh $(PYTHON)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r $<
	touch $@

$(VENV)/.requirements-test: requirements-test.txt $(VENV)/.requirements
	$(PIP_INSTALL) -r $<
	touch $@

$(VENV)/.requirements-cuda: requirements-cuda.txt $(VENV)/.requirements
	$(PIP_INSTALL) -r $<
	touch $@

# What make builds is run here: where there is no driver, the CUDA half would be minutes of compiling for nothing.
without_driver := $(if $(wildcard /proc/driver/nvidia /dev/nvidiactl /dev/dxg),,-DFLASHMOE_CUDA=OFF)
for_here := CMAKE_ARGS="$(without_driver) $${CMAKE_ARGS:-}"

# Without isolation the build uses the pinned tools above, and its folder under build/ is good for the next build.
# setup.py first, since pip would compile silently.
$(VENV)/.flashmoe: $(VENV)/.requirements $(BUILD_INPUTS)
	$(call section,Extension flashmoe._C)
	$(for_here) $(BIN)/python setup.py --quiet build_ext --inplace
	$(for_here) $(PIP_INSTALL) --quiet --no-build-isolation --no-deps --editable .
	touch $@

test-cpp: test-cpp-plain test-cpp-thread test-cpp-address

# A new compiler's new warning must not stop a newcomer; our own runs treat it as an error.
configure_cpp = $(BIN)/cmake -S . -B build/cpp-$(1) -G Ninja --log-level=WARNING \
                -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
                -DFLASHMOE_PYTHON=OFF -DFLASHMOE_TESTS=ON -DFLASHMOE_SANITIZE=$(filter-out plain,$(1)) -DFLASHMOE_WERROR=$(if $(CI),ON,OFF)

test-cpp-%: $(VENV)/.requirements
	$(call section,C++ tests: $*)
	$(call configure_cpp,$*)
	$(BIN)/cmake --build build/cpp-$*
	$(BIN)/ctest --test-dir build/cpp-$* --parallel $$(nproc) --output-on-failure --no-tests=error

test-python: build $(VENV)/.requirements-test
	$(call section,Python tests)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

cuda: $(VENV)/.requirements-cuda
	$(call section,CUDA: machine code)
	$(BIN)/python tools/check_cuda.py

# Each of its sections tells its own seconds.
bench: build $(VENV)/.requirements-test
	PYTHON=$(BIN)/python bench/all.sh $(BENCH_OUT)

bench-micro: build $(VENV)/.requirements-test
	$(call section,flashmoe bench micro)
	$(BIN)/flashmoe bench micro $(MICRO_ARGS)

bench-cpp: $(VENV)/.requirements
	$(call section,C++ benches)
	$(call configure_cpp,plain)
	$(BIN)/cmake --build build/cpp-plain --target benches

verify:
	$(call section,Model of the protocol)
	@if ! command -v spin >/dev/null; then \
	  if [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "make verify needs the model checker spin; on Debian and Ubuntu: apt-get install spin" >&2; exit 1; \
	  fi; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get install -qq -y spin || { apt-get update -qq && apt-get install -qq -y spin; }; \
	fi
	$(PYTHON) docs/model/verify.py

clean:
	rm -rf build dist flashmoe.egg-info flashmoe/_C.*.so $(VENV)/.flashmoe
