# make demo | test | docs | check: each makes .venv here when it is missing, then runs.
# PYTHON=/path/to/python3.12 chooses the interpreter the environment is made with.

PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$candidate"; break; }; done)
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help demo test docs check format clean

help:
	@echo "make demo    train the recipes on real digits and compare them (about 3 minutes)"
	@echo "make test    the tests (about 9 minutes on two cores)"
	@echo "make docs    the documentation, in build/docs/index.html (under a minute)"
	@echo "make check   format, lint, types, import floors, documentation, tests"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the environment and caches (results under runs/ stay)"

# Half-made environments have no .ready and are made again from nothing; a finished one is brought
# up to date when pyproject.toml changes. One pip command, so that torch, torchvision and timm are
# resolved together: a torch chosen first can be one that torchvision does not load with.
$(READY): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "filterwise needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	fi
	@if [ -e $(READY) ]; then \
		echo "Bringing $(VENV) up to date with pyproject.toml ..."; \
	else \
		echo "Making $(VENV): installing torch, torchvision and the tools (about 2 minutes, up to 6 GB) ..."; \
		"$(PYTHON)" -m venv --clear $(VENV); \
	fi
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(RUN)/filterwise compare

test: $(READY)
	$(RUN)/python -m pytest --numprocesses $(WORKERS)

docs: $(READY)
	$(RUN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	@echo "Documentation: build/docs/index.html"

check: $(READY)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright
	$(RUN)/lint-imports --no-logo
	$(RUN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	$(RUN)/python -m pytest --numprocesses $(WORKERS)

format: $(READY)
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
