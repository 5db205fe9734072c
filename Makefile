# Every command of the series; `make help` lists them.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CORPUS ?= sample
PROFILE ?= $(if $(filter sample,$(CORPUS)),sample,cornell)
RUN ?= $(basename $(notdir $(CORPUS)))
DEVICE ?= auto
PARAMS ?=
PYTHON ?= python3
VENV ?= .venv

ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
# Paths count from where make was called: make -C (which sets w in MAKEFLAGS) has left that folder already.
HERE := $(if $(findstring w,$(firstword -$(MAKEFLAGS))),$(PWD),$(CURDIR))
ifneq ($(filter sample cornell,$(CORPUS)),)
SOURCE := $(CORPUS)
else
SOURCE := $(shell cd '$(HERE)' && $(PYTHON) -c 'import os, sys; print(os.path.abspath(sys.argv[1]))' '$(CORPUS)')
endif

ifeq ($(VENV),)
PY := $(PYTHON)
INSTALLED :=
export PYTHONPATH := $(ROOT)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(ROOT)$(VENV)/bin/python
INSTALLED := $(ROOT)$(VENV)/.installed
endif

# Notebooks run with nothing of the user's own IPython set-up and without the kernel's notes on its transport.
export IPYTHONDIR := $(ROOT)runs/.ipython
KERNEL := $(IPYTHONDIR)/profile_default/ipython_kernel_config.py
export WANDB_SILENT := true
# PyTorch's profiler warns of memory older than the profile, at times, on stderr: it would stand in notebook 06.
export TORCH_CPP_LOG_LEVEL := ERROR

# The C library (glibc) keeps freed memory for the next tensors, in place of giving it back to the system, which hands
# it out again page by page: thousands of page faults in every training step.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 2147483647

NAMES := 01_data_preparation 02_model 03_training 04_decoding_and_chat 05_hyperparameter_sweep 06_profiling \
         07_torchscript_and_latency
ALL := $(NAMES) solutions
FOLDER := $(ROOT)runs/$(RUN)
DONE := $(NAMES:%=$(FOLDER)/notebooks/%.ipynb)
SOLVED := $(FOLDER)/notebooks/solutions.ipynb
HELPERS := $(wildcard $(ROOT)helpers/*.py $(ROOT)corpora/sample/*)
SETTINGS := corpus=$(SOURCE) profile=$(PROFILE) device=$(DEVICE) params=$(PARAMS)
STAMP := $(FOLDER)/.settings
EXECUTE := $(PY) $(ROOT)tools/run_notebook.py
PARAMETERS := -p run '$(RUN)' -p corpus '$(SOURCE)' -p profile '$(PROFILE)' -p device '$(DEVICE)' $(PARAMS)

# `make gpu` takes at most so many seconds and writes here; what CUDA gave is copied to results/, finished or not.
BUDGET ?= 530
OUT ?= runs/gpu

# A sweep has a run of its own, runs/sweep, and a profile for short trials, unless others are named.
SPACE ?= sweep
SWEEP_FOLDER := $(ROOT)runs/$(if $(filter file,$(origin RUN)),sweep,$(RUN))
SWEEP_DATA := --run '$(SWEEP_FOLDER)' --device $(DEVICE) --corpus '$(SOURCE)' \
    --profile '$(if $(filter file,$(origin PROFILE)),sweep,$(PROFILE))' $(STORAGE:%=--storage '%') $(WANDB:%=--wandb %)

.PHONY: help run-all test lint unit check soak sweep sweep-worker sweep-best profile latency bench gpu compare images wheelhouse lab html outputs FORCE

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20
	@echo
	@echo "  CORPUS=sample|cornell|PATH  RUN=name  PROFILE=sample|cornell|classic  DEVICE=auto|cpu|cuda"
	@echo "  PARAMS=\"-p name value\" reaches the notebooks; PYTHON=python3 VENV= uses that interpreter as it is."

run-all: $(DONE) ## notebooks 01 to 07 in order; executed copies and all results in runs/NAME
	@echo "Done: runs/$(RUN) holds the executed notebooks, the checkpoint, figures and tables."

# Each notebook needs its source, the helpers, the settings and the notebook before it.
define notebook
$(FOLDER)/notebooks/$(1).ipynb: $(ROOT)notebooks/$(1).ipynb $(HELPERS) $(wildcard $(ROOT)notebooks/*.yaml) \
    $(wildcard $(ROOT)notebooks/profiles/*.yaml) $(STAMP) $(2:%=$(FOLDER)/notebooks/%.ipynb) | $(INSTALLED) $(KERNEL)
	@echo "running $(1) …"
	@$(EXECUTE) $$< $$@ $(PARAMETERS)
endef
previous :=
$(foreach name,$(ALL),$(eval $(call notebook,$(name),$(previous)))$(eval previous := $(name)))

# Rewritten only when the settings differ from those of the last run, so that these never find an old run current.
$(STAMP): FORCE
	@mkdir -p '$(@D)'
	@printf '%s\n' "$(SETTINGS)" | cmp -s - '$@' || printf '%s\n' "$(SETTINGS)" > '$@'

$(KERNEL):
	@mkdir -p '$(@D)'
	@echo "c.IPKernelApp.log_level = 50" > '$@'

ifneq ($(VENV),)
$(INSTALLED): $(ROOT)requirements.in $(ROOT)constraints.txt $(ROOT)requirements.txt $(ROOT)pyproject.toml
	@echo "installing into $(VENV) (once) …"
	@$(PYTHON) -m venv $(ROOT)$(VENV) || { echo "error: $(PYTHON) -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
	@cd $(ROOT) && $(PY) -m pip install -qq --disable-pip-version-check -r requirements.txt
	@cd $(ROOT) && $(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
endif

test: lint unit run-all check ## lint, unit tests, run-all, committed notebooks against their outputs

lint: | $(INSTALLED)
	@cd $(ROOT) && $(PY) -m ruff check . && $(PY) -m ruff format --check --quiet .

unit: | $(INSTALLED)
	@cd $(ROOT) && $(PY) -m pytest -n 2 --dist loadfile

# nbval re-runs the committed notebooks on a copy of the run, the checkpoint must answer as the README says, and
# where Chromium is installed a reader's visit is played.
check: run-all | $(INSTALLED) $(KERNEL)
	@cd $(ROOT) && copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && cp -r '$(FOLDER)' "$$copy/sample" && \
	    CHATBOT_RUNS="$$copy" $(PY) -m pytest --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg \
	    --nbval-cell-timeout 900 -p no:cacheprovider notebooks && \
	    CHATBOT_RUNS="$$copy" $(PY) -m pytest tests/check_run.py tests/check_browser.py tests/check_gpu.py

# The same tests of faults as in `make unit`, at their full length, printing what they counted.
soak: | $(INSTALLED) ## the long series: kills and resumes, mutated files and lines, notebooks mistreated
	@cd $(ROOT) && CHATBOT_SOAK=1 $(PY) -m pytest -s tests/test_faults.py tests/test_hostile.py tests/test_notebooks.py

sweep: | $(INSTALLED) ## the sweep of notebooks/SPACE.yaml: W&B with a login, Optuna without; CORPUS=… TRIALS=n
	@cd $(ROOT) && $(PY) -m helpers sweep notebooks/$(SPACE).yaml $(SWEEP_DATA) $(TRIALS:%=--trials %)

sweep-worker: | $(INSTALLED) ## joins a running sweep: SWEEP=id, as 'make sweep' prints it
	@cd $(ROOT) && $(PY) -m helpers sweep-worker '$(SWEEP)' $(SWEEP_DATA)

sweep-best: | $(INSTALLED) ## a sweep's best settings as a profile, runs/sweep/best.yaml: SWEEP=id
	@cd $(ROOT) && $(PY) -m helpers best '$(SWEEP)' --run '$(SWEEP_FOLDER)' $(STORAGE:%=--storage '%')

profile: | $(INSTALLED) $(KERNEL) ## notebook 06 alone on an existing checkpoint, its tables into results/: RUN=name DEVICE=cuda
	@$(EXECUTE) $(ROOT)notebooks/06_profiling.ipynb $(FOLDER)/notebooks/06_profiling.ipynb -p full true $(PARAMETERS)

latency: | $(INSTALLED) $(KERNEL) ## notebook 07 alone with its whole table, into results/: RUN=name DEVICE=cuda
	@$(EXECUTE) $(ROOT)notebooks/07_torchscript_and_latency.ipynb $(FOLDER)/notebooks/07_torchscript_and_latency.ipynb \
	    -p full true $(PARAMETERS)

compare: | $(INSTALLED) ## the classic recipe and ours trained on CORPUS (half an hour and more), to results/
	@cd $(ROOT) && $(PY) -m benchmarks.compare --corpus '$(SOURCE)' --device '$(DEVICE)'

images: run-all ## the pictures in images/ and the tables of README, from results/ and the run
	@cd $(ROOT) && $(PY) -m tools.make_images --run '$(FOLDER)'
	@CHATBOT_SCREENSHOT='$(ROOT)images/chat.png' $(PY) -m pytest $(ROOT)tests/check_browser.py
	@cd $(ROOT) && $(PY) -m tools.readme_tables

wheelhouse: | $(INSTALLED) ## all packages as files, for a machine without an index (README says how)
	@cd $(ROOT) && $(PY) -m pip download -qq --disable-pip-version-check -d wheelhouse -r requirements.txt

bench: | $(INSTALLED) ## this project against the textbook way, side by side: results/bench-MACHINE.json
	@cd $(ROOT) && $(PY) -m benchmarks.bench --device $(DEVICE) --json results/bench-DEVICE.json

gpu: | $(INSTALLED) ## every CUDA measurement in one call of minutes, in stages: results/*-cuda.json; BUDGET=seconds OUT=folder
	@cd $(ROOT) && $(PY) -m benchmarks.gpu --device $(if $(filter auto,$(DEVICE)),cuda,$(DEVICE)) --corpus '$(SOURCE)' \
	    --budget $(BUDGET) --out '$(OUT)'; status=$$?; cp -u '$(OUT)'/*-cuda.json results/ 2>/dev/null; exit $$status

lab: | $(INSTALLED) ## JupyterLab at notebook 01
	@cd $(ROOT)notebooks && env -u IPYTHONDIR $(PY) -m jupyterlab 01_data_preparation.ipynb

html: run-all $(SOLVED) ## executed notebooks and solutions as pages in runs/NAME/html, formulas readable offline
	@$(PY) $(ROOT)tools/make_pages.py '$(FOLDER)/html' $(DONE) $(SOLVED)

outputs: run-all $(SOLVED) ## the committed notebooks' outputs from a default run
	@for name in $(ALL); do cp "$(FOLDER)/notebooks/$$name.ipynb" "$(ROOT)notebooks/$$name.ipynb"; done
	@cd $(ROOT)notebooks && $(PY) -m nbstripout --keep-output --keep-count --extra-keys "metadata.papermill \
	    metadata.language_info cell.metadata.papermill cell.metadata.execution" $(ALL:%=%.ipynb)
	@cd $(ROOT)notebooks && touch -r '$(STAMP)' $(ALL:%=%.ipynb)
