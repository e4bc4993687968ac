# make demo | check | test | clients | lint | bench | clean: each makes what it needs first, on a machine with python3, its venv, g++ and make.
# make release-check: before a release. make wheel: a wheel in dist/, for the torch of the environment.
# make sanitize: the CPU's code with AddressSanitizer and UBSan. make arm-check: the CPU kernels on ARM, in emulation.
# make cuda-check: with nvcc, and no GPU. make gpu: with a GPU, and no network.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
EPOCHS ?= 100

VENV := .venv
RUN  := $(VENV)/bin
# What the compiled module is made of; editing Python needs no new build.
BUILT_FROM := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo check test fuzz clients notebooks release-check lint docs bench bench-quick format build wheel sanitize sanitize-kernels arm-check cuda-check gpu clean distclean

demo: build
	@echo "== breast cancer: 569 rows of 30 features; the same SGD loop with torch.nn and with fused layers"
	$(RUN)/mlp-ext train --layers all --data breast_cancer --hidden 16 --epochs $(EPOCHS) --batch-size 32 --lr 0.1
	@echo "== the tutorial: 10 random rows, 10-5-1"
	$(RUN)/mlp-ext train --layers all --data tutorial --epochs $(EPOCHS)

# As many workers as cores, each with one thread. WORKERS=0: one process, as pytest does by itself.
WORKERS ?= auto
PYTEST  := $(RUN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

# Before each commit.
check: build
	@echo "== tests but for the slow ones"
	$(PYTEST) -m "not slow and not release"

# Also the slow ones: every CUDA kernel on the CPU, child processes, instruction sets below this processor's, the sanitizers.
test: build
	@echo "== tests"
	$(PYTEST)

# Drawn cases against native torch, on each instruction set; goes on after the seeds in the log.
MINUTES ?= 5
FUZZ    := build/fuzz.jsonl
fuzz: build
	@echo "== fuzzing for $(MINUTES) minutes, log in $(FUZZ)"
	PYTHONPATH=tests $(RUN)/python -m fuzz --minutes $(MINUTES) --log $(FUZZ)

# With other libraries, in an environment of their own.
CLIENTS := .venv-clients
clients: build $(CLIENTS)/tools
	@echo "== tests with the libraries that people use with torch"
	PYTHONPATH="$(CURDIR)" $(CLIENTS)/bin/python -m pytest tests/clients

$(CLIENTS)/tools: tests/clients/requirements.txt
	@echo "== making the environment $(CLIENTS) with $(TORCH): 2 GB"
	@test -x $(CLIENTS)/bin/pip || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" -r $<
	@touch $@

# Executes the notebooks in fresh kernels. OUTPUTS=1: also writes their outputs, as they are committed, without metadata of this machine.
NOTEBOOKS := examples/*.ipynb
CLEAR     := --ClearMetadataPreprocessor
notebooks: build
	@echo "== executing $(NOTEBOOKS)"
ifdef OUTPUTS
	$(RUN)/jupyter-nbconvert --execute --inplace --to notebook $(CLEAR).enabled=True \
	    $(CLEAR).preserve_nb_metadata_mask='{"kernelspec", ("language_info", "name")}' $(NOTEBOOKS)
else
	$(PYTEST) --nbmake --nbmake-timeout=300 --durations=0 $(NOTEBOOKS)
endif

# Before a release: more tests with the sanitizers; the sdist too, whose wheel is installed in an environment of its own.
release-check: test clients
	@echo "== tests of what is released"
	$(RUN)/python -m pytest -m release
	$(MAKE) sanitize SANITIZED="$(SANITIZED) $(SANITIZED_TOO)"

# The figures and charts of README and docs/performance.md. Leave the machine alone meanwhile.
# A folder by the name of your machine.
RESULTS ?= benchmarks/results
BENCH   := $(RUN)/mlp-ext bench
LAYERS  := $(BENCH) --suite layers --peak
SWEEP   := $(LAYERS) --cases sweep --providers native,fused --rounds 9
TRAIN   := $(RUN)/mlp-ext train --layers all --epochs 100
bench: build
	@echo "== benchmarks against native torch and its peers"
	@mkdir -p $(RESULTS)
	$(LAYERS) --mode full --csv $(RESULTS)/layers-full-relu.csv --plot $(RESULTS)/layers-full-relu.png
	$(LAYERS) --mode full --activation sigmoid --csv $(RESULTS)/layers-full-sigmoid.csv
	$(LAYERS) --mode forward --providers native,native_inplace,compile,mkldnn,fused --csv $(RESULTS)/layers-forward-relu.csv
	$(LAYERS) --mode full --dtype bfloat16 --providers native,fused --csv $(RESULTS)/layers-full-relu-bfloat16.csv
	$(BENCH) --suite train --peak --providers native,compile,compile-step,fused,stack,step,fit --csv $(RESULTS)/train-step-relu.csv --plot $(RESULTS)/train-step-relu.png
	$(RUN)/python benchmarks/readme_chart.py
	$(BENCH) --suite train --peak --dtype bfloat16 --providers native,fused,stack,step,fit --csv $(RESULTS)/train-step-relu-bfloat16.csv
	$(BENCH) --suite train --optimizer adam --peak --providers native,native_fused,compile-step,stack,step,fit --csv $(RESULTS)/train-step-relu-adam.csv
	$(BENCH) --suite many --peak --csv $(RESULTS)/many-step-relu.csv --plot $(RESULTS)/many-step-relu.png
	$(BENCH) --suite sklearn --csv $(RESULTS)/sklearn-fit.csv
	@echo "== a sweep of sizes, with all threads and with one"
	$(SWEEP) --mode full --csv $(RESULTS)/sweep-full-relu.csv
	$(SWEEP) --mode forward --csv $(RESULTS)/sweep-forward-relu.csv
	$(SWEEP) --mode full --dtype bfloat16 --csv $(RESULTS)/sweep-full-relu-bfloat16.csv
	$(SWEEP) --mode forward --dtype bfloat16 --csv $(RESULTS)/sweep-forward-relu-bfloat16.csv
	$(SWEEP) --mode full --threads 1 --csv $(RESULTS)/sweep-full-relu-1thread.csv
	$(SWEEP) --mode forward --threads 1 --csv $(RESULTS)/sweep-forward-relu-1thread.csv
	@echo "== the demo's times"
	$(TRAIN) --data breast_cancer --hidden 16 --batch-size 32 --lr 0.1 --json $(RESULTS)/demo-breast_cancer.json
	$(TRAIN) --data tutorial --json $(RESULTS)/demo-tutorial.json

bench-quick: build
	@echo "== native and ours, layers and training steps"
	$(RUN)/mlp-ext bench --suite layers --providers native,fused --rounds 10
	$(RUN)/mlp-ext bench --suite train --providers native,fused,step,fit --rounds 10

CPP = $(shell find csrc tests/cpu_kernels tests/cuda_on_cpu tests/team -type f -not -name "*.map") tests/vector_functions.cpp
lint: $(VENV)/tools
	@echo "== lint: ruff, clang-format, mypy"
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run --Werror $(CPP)
	$(RUN)/mypy

format: $(VENV)/tools
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(CPP)

# The documentation as a site; warnings are errors. In an environment of its own, which needs no torch.
DOCS := .venv-docs
docs: $(DOCS)/tools
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "== the site is in build/site/index.html"

$(DOCS)/tools: pyproject.toml
	@echo "== making the environment $(DOCS)"
	@test -x $(DOCS)/bin/pip || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(DOCS)/bin/python -c 'from setuptools.config.pyprojecttoml import read_configuration as read; print(*read("pyproject.toml", expand=False)["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r $(DOCS)/requirements.txt
	@touch $@

# PATH, so that the environment's ninja is found.
build: $(VENV)/built

# Beside the torch in the environment: its libraries, OpenMP's and CUDA's are left out of the wheel. auditwheel
# keeps the date that setup.py gave all files.
OF_TORCH := libtorch* libc10* libgomp* libcu* libnv*
wheel: $(VENV)/tools
	@echo "== compiling a wheel"
	@rm -rf build/wheel
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(RUN):$$PATH" SOURCE_DATE_EPOCH=$$($(RUN)/python -c '$(DATE)' build/wheel/mlp_ext-*.whl) \
	    $(RUN)/auditwheel repair $(foreach lib,$(OF_TORCH),--exclude '$(lib)') --wheel-dir dist build/wheel/mlp_ext-*.whl
DATE := import calendar, sys, zipfile; print(calendar.timegm(zipfile.ZipFile(sys.argv[1]).infolist()[0].date_time))

# AddressSanitizer and UBSan: the kernels without torch, and the extension, in build/sanitized, under tests that reach each of
# its paths. SANITIZED: other tests. Python's own leaks are not reported; freed results stay in no cache. libstdc++ is loaded
# first, since AddressSanitizer looks for its functions when it starts.
SANITIZED     ?= $(addprefix tests/test_,guard_pages.py values.py gradients.py train_step.py train_steps.py)
SANITIZED_TOO := $(addprefix tests/test_,activations.py fit.py library.py mlp.py narrow_steps.py predict.py regions.py train_operator.py train_operator_errors.py)
SANITIZE  := MLP_EXT_SANITIZE=1 MLP_EXT_ISA=native MLP_EXT_CUDA=0
sanitize-kernels: build
	@echo "== the kernels without torch, with sanitizers"
	$(PYTEST) -k sanitize tests/test_cpu_kernels.py tests/test_team.py tests/test_cuda_on_cpu.py

sanitize: sanitize-kernels
	@echo "== compiling the extension with sanitizers"
	PATH="$(CURDIR)/$(RUN):$$PATH" $(SANITIZE) $(RUN)/python setup.py --quiet build --build-lib build/sanitized --build-temp build/sanitized-temp
	@echo "== tests with sanitizers"
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 MLP_EXT_RESULTS_MIB=0 PYTHONPATH=build/sanitized \
	    $(RUN)/pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal -m "not slow and not release" $(SANITIZED)

$(VENV)/built: $(VENV)/tools $(BUILT_FROM)
	@echo "== compiling the extension (about four minutes)"
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

# torch first and pinned, so that nothing later picks another. Python 3.10 has no tomllib; setuptools has one.
$(VENV)/tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mlp_ext needs Python 3.10 or newer; set PYTHON=...")'
	@command -v $${CXX:-g++} >/dev/null || { echo "mlp_ext needs a C++ compiler: install g++, or set CXX"; exit 1; }
	@echo "== making the environment $(VENV) with $(TORCH) and the tools"
	@test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV) || { echo "python3 has no venv: install python3-venv"; exit 1; }
	$(RUN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77"
	$(RUN)/python -c 'from setuptools.config.pyprojecttoml import read_configuration as read; d = read("pyproject.toml", expand=False)["project"]["optional-dependencies"]; print(*d["demo"], *d["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(RUN)/pip install --quiet --disable-pip-version-check "$(TORCH)" -r $(VENV)/requirements.txt
	@touch $@

# CUDA without a GPU: compiles for 8.0 and 9.0, fails where a kernel spills registers or its wgmma is serialised, and runs
# the tests that launch nothing. CUDA's torch is not where a CPU's may be pinned, so pip looks in the package index alone.
CUDA       := .venv-cuda
CUDA_TORCH ?= torch==2.13.0
CUDA_PIP   := PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= $(CUDA)/bin/pip install --quiet --disable-pip-version-check
CUDA_TESTS := $(addprefix tests/test_,build.py cuda.py cuda_plan.py dispatch.py errors.py import.py)

CUDA_ARCHS ?= 8.0 9.0
cuda-check: $(CUDA)/tools
	@echo "== compiling for CUDA (about four minutes), log in $(CUDA)/build.log"
	rm -rf build/temp.* build/lib.* build/bdist.* build/joined
	PATH="$(CURDIR)/$(CUDA)/bin:$$PATH" MLP_EXT_CUDA=1 MLP_EXT_ISA=native TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" NVCC_APPEND_FLAGS=-Xptxas=-v \
	    $(CUDA)/bin/pip install -v --no-build-isolation --no-deps --force-reinstall . > $(CUDA)/build.log 2>&1 \
	    || { tail -50 $(CUDA)/build.log; exit 1; }
	@grep -q "bytes spill" $(CUDA)/build.log || { echo "ptxas said nothing"; exit 1; }
	@! grep -B 2 -E "[1-9][0-9]* bytes spill|serialized" $(CUDA)/build.log
	@echo "== $$(grep -c 'bytes spill' $(CUDA)/build.log) kernels, no spill, no serialised wgmma"
	$(CUDA)/bin/mlp-ext info
	$(CUDA)/bin/pytest -m "not slow and not release and not cuda" $(CUDA_TESTS)

$(CUDA)/tools: Makefile
	@echo "== making the environment $(CUDA) with CUDA's $(CUDA_TORCH): 5 GB"
	@test -x $(CUDA)/bin/pip || $(PYTHON) -m venv $(CUDA)
	$(CUDA_PIP) "$(CUDA_TORCH)" "setuptools>=77" hypothesis ninja numpy pytest
	$(CUDA_PIP) --no-deps nvidia-cutlass==4.2.0.0
	@touch $@

# On a machine with a GPU: log and CSV files in RESULTS, under ten minutes in all. Further steps: peers suite.
STEPS := build measure tests sanitize
gpu:
	PYTHON="$(PYTHON)" benchmarks/gpu.sh $(RESULTS) $(STEPS)

# The CPU kernels on ARM, cross-compiled by Debian's compiler and run in emulation.
arm-check: build
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null \
	    || { mkdir -p build && { apt-get update -qq && apt-get install -qqy --no-install-recommends g++-aarch64-linux-gnu qemu-user; } > build/arm-check.log 2>&1; } \
	    || { echo "make arm-check needs a cross-compiler and an emulator, which apt-get did not install (build/arm-check.log): type sudo apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	@echo "== the CPU kernels on ARM, in emulation (about two minutes)"
	$(RUN)/python -m pytest -k aarch64 tests/test_cpu_kernels.py tests/test_vector_functions.py

clean:
	rm -rf build dist *.egg-info mlp_ext/_built.py mlp_ext/*.so $(VENV)/built
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mlp_ext tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(CUDA) $(CLIENTS) $(DOCS)
