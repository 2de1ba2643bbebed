# Each target sets up .venv by itself when it is missing or older than what it is made from.
# Folders named quant, eval and results exist: every target has to be phony.
.PHONY: quant eval test slow families lint types format clean help
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= cpu,dev
READY := $(VENV)/.ready-$(EXTRAS)
RAY := $(VENV)/.ready-ray
# These two pin or pull a second OpenCV build; what they really need is in pyproject.toml.
NO_DEPS := paddleslim rapidocr-paddle rapidocr

help:
	@echo "make quant MODEL=PP-OCRv4_mobile_det   quantize, export, evaluate, gate"
	@echo "make eval [MODEL=...]                  FP32 against INT8, the diff table"
	@echo "make test | slow | families | lint | clean"

quant: $(READY)
	@test -n "$(MODEL)" || { echo "usage: make quant MODEL=PP-OCRv4_mobile_det (see: $(BIN)/quant list)"; exit 2; }
	$(BIN)/quant run $(MODEL) $(ARGS)

eval: $(READY)
	$(BIN)/quant eval $(or $(MODEL),--all) $(ARGS)

test: $(READY)
	$(BIN)/pytest -q -n 2 --dist loadgroup -m "not slow and not family"

# Much of a main job keeps one processor busy: two of them side by side, with a thread each, take less time.
slow: $(READY) $(RAY)
	$(BIN)/pytest -q -m slow -n 2 --dist loadgroup --no-loadscope-reorder --timeout 2700 --durations=10

families: $(READY)
	$(BIN)/pytest -q -m family --durations=0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find quant eval calib_data tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The pinned versions have wheels for this Python alone.
IS_THIS_PYTHON := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'
NAMES := python3.11 python3 python

# uv where it is installed, which fetches Python too, plain venv and pip where not; both end with the same versions.
ifneq ($(shell command -v uv 2>/dev/null),)
PYTHON ?= 3.11
INTERPRETER = uv run -q --no-project --python $(PYTHON) python
CREATE = uv venv -q --clear --python $(PYTHON) $(VENV)
INSTALL := uv pip install -q --python $(BIN)/python -c constraints.txt
else
PYTHON ?= $(shell for name in $(NAMES); do $$name $(IS_THIS_PYTHON) 2>/dev/null && echo $$name && break; done)
INTERPRETER = $(or $(PYTHON),false)
CREATE = $(INTERPRETER) -m venv --clear $(VENV)
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
endif
NO_PYTHON = Python 3.11 is needed and was not found as $(or $(PYTHON),$(NAMES)): get it (pyenv install 3.11; python3.11 and \
python3.11-venv, on Ubuntu from the deadsnakes PPA; or install uv, which fetches it) and say where it is if it has \
another name: make PYTHON=/path/to/python ...

$(READY): pyproject.toml constraints.txt Makefile
	@$(INTERPRETER) $(IS_THIS_PYTHON) 2>/dev/null || { echo "$(NO_PYTHON)" >&2; exit 2; }
	@echo "set-up, 1 of 3: creating the environment $(VENV)"
	@$(CREATE)
	@echo "set-up, 2 of 3: downloading and installing this program and what it needs ($(EXTRAS)), which takes minutes"
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@echo "set-up, 3 of 3: installing $(NO_DEPS)"
	@$(INSTALL) --no-deps $(NO_DEPS)
	@touch "$(READY)"

# For the slow tests alone; where it cannot be had, the test that needs it says that it was skipped.
$(RAY): $(READY)
	@$(INSTALL) ray 2>/dev/null && touch "$(RAY)" || echo "no Ray to be had"
