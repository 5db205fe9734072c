# Names of commands, and nothing else: tools/series.py knows what each does. `make help` lists them.
.DEFAULT_GOAL := help
.NOTPARALLEL:
TARGETS := help run-all test lint unit check html lab sweep sweep-worker sweep-best profile latency compare bench \
           speedrun mistakes gpu images outputs soak wheelhouse
.PHONY: $(TARGETS)

# Variables of the command line reach it by the environment, as they were written: a $ in a password is one.
NAMES := CORPUS RUN PROFILE DEVICE PARAMS PYTHON VENV OUT SWEEP SPACE STORAGE LABFLAGS
$(foreach name,$(NAMES),$(if $(value $(name)),$(eval override $(name) := $$(value $(name)))$(eval export $(name))))
export CALLED_FROM := $(value PWD)
export THIS := $(MAKEFILE_LIST)

$(TARGETS):
	@"$${PYTHON:-python3}" -E "$$(dirname "$${THIS# }")/tools/series.py" $@
