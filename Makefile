# make demo | test | lint | bench | clean: each makes what it needs first, on a machine with python3, its venv, g++ and make.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
EPOCHS ?= 100

VENV := .venv
RUN  := $(VENV)/bin
# What the compiled module is made of; editing Python needs no new build.
BUILT_FROM := setup.py pyproject.toml VERSION $(shell find csrc -type f)

.PHONY: demo test lint bench bench-quick format build clean distclean

demo: build
	@echo "== breast cancer: 569 rows of 30 features; the same SGD loop with torch.nn and with fused layers"
	$(RUN)/mlp-ext train --layers all --data breast_cancer --hidden 16 --epochs $(EPOCHS) --batch-size 32 --lr 0.1
	@echo "== the tutorial: 10 random rows, 10-5-1"
	$(RUN)/mlp-ext train --layers all --data seed --epochs $(EPOCHS)

test: build
	@echo "== tests"
	$(RUN)/python -m pytest

# The README's figures and its chart. Leave the machine alone meanwhile.
RESULTS := benchmarks/results
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
	$(BENCH) --suite train --peak --csv $(RESULTS)/train-step-relu.csv
	@echo "== a sweep of sizes, with all threads and with one"
	$(SWEEP) --mode full --csv $(RESULTS)/sweep-full-relu.csv
	$(SWEEP) --mode forward --csv $(RESULTS)/sweep-forward-relu.csv
	$(SWEEP) --mode full --threads 1 --csv $(RESULTS)/sweep-full-relu-1thread.csv
	$(SWEEP) --mode forward --threads 1 --csv $(RESULTS)/sweep-forward-relu-1thread.csv
	@echo "== the demo's times"
	$(TRAIN) --data breast_cancer --hidden 16 --batch-size 32 --lr 0.1 --json $(RESULTS)/demo-breast_cancer.json
	$(TRAIN) --data seed --json $(RESULTS)/demo-seed.json

bench-quick: build
	@echo "== native and fused, layers and training steps"
	$(RUN)/mlp-ext bench --suite layers --providers native,fused --rounds 10
	$(RUN)/mlp-ext bench --suite train --providers native,fused --rounds 10

lint: $(VENV)/tools
	@echo "== lint: ruff, clang-format, mypy"
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run --Werror $(shell find csrc -type f)
	$(RUN)/mypy

format: $(VENV)/tools
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(shell find csrc -type f)

build: $(VENV)/built

# PATH, so that the environment's ninja is found.
$(VENV)/built: $(VENV)/tools $(BUILT_FROM)
	@echo "== compiling the extension (about two minutes the first time)"
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

clean:
	rm -rf build dist *.egg-info mlp_ext/_built.py mlp_ext/*.so $(VENV)/built
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mlp_ext tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
