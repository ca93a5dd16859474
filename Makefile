# This needs git, make, pip and a Python >=3.11,<3.15. Nothing is installed outside .venv.
#   make train                        train on the built-in digits
#   make train ARGS="model=resnet18"  with any words of `commands.py train`
#   make setup PYTHON=/path/to/python3.12

PYTHON ?=
ARGS ?=
POETRY ?= poetry
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow test-all lint docs lock repro clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

setup: $(READY)  ## install the pinned packages into .venv (3 minutes and 6 GB the first time)
	@echo ".venv is ready"

train: $(READY)  ## train on the built-in digits, or on your photographs: make train ARGS="photos/"
	@$(BIN)/python commands.py train $(ARGS)

# Python keeps its compiled files: the tests start it hundreds of times.
test test-slow test-all: export PYTHONDONTWRITEBYTECODE =

test: $(READY)  ## run the default tests on all cores, without network and GPU; ARGS="-k split" selects some
	@$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: $(READY)  ## run only the slow tests, on two cores
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not (gpu or triton or network or browser)" $(ARGS) || test $$? -eq 5  # 5: there are none

test-all: $(READY)  ## run all tests; those that cannot run on this machine are skipped with a reason
	@$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(READY)  ## run all pre-commit checks on all files
	@PRE_COMMIT_HOME=.cache/pre-commit $(BIN)/pre-commit run --all-files

docs: $(READY)  ## build the documentation in site/; a warning or a broken link is an error
	@rm -rf site && $(BIN)/python -m sphinx --builder html --conf-dir docs --fresh-env --doctree-dir .cache/docs \
	  --fail-on-warning --nitpicky --keep-going --quiet . site && echo "site/index.html is ready"

repro: $(READY)  ## run the DVC stages whose inputs changed: prepare, train, test
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro $(ARGS)

lock:  ## update the locked versions from pyproject.toml: poetry.lock, requirements.txt and the Dockerfile's two lists (needs Poetry)
	@$(POETRY) export --help >/dev/null 2>&1 || { \
	  echo "make lock needs Poetry >=2.2 with its export plugin: pipx install poetry && pipx inject poetry poetry-plugin-export" >&2; exit 1; }
	$(POETRY) lock
	$(POETRY) export --all-extras --with dev,docs,build,cuda --output requirements.txt
	$(POETRY) export --only main --extras serve --output deploy/requirements-serve.txt
	$(POETRY) export --only build --output deploy/requirements-build.txt

clean:  ## remove .venv and the tools' caches; data, models and plots stay
	rm -rf .venv .cache site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted installation is taken up again where pip left it; pip writes a package's INSTALLER
# near the end, so one without it was cut off half-way and must not count as installed.
# A Python without ensurepip (Debian without python3-venv) lends its own pip to the new environment.
$(READY): requirements.txt
	@fits='import sys, venv, importlib.util as u; sys.exit(not ((3, 11) <= sys.version_info < (3, 15) and sys.version_info[:3] != (3, 14, 1) and (u.find_spec("ensurepip") or u.find_spec("pip"))))'; \
	python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.14 python3.13 python3.12 python3.11 python3 python); do \
	  if "$$candidate" -c "$$fits" >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "$(if $(PYTHON),$(PYTHON) is not,No) Python >=3.11,<3.15 (but not 3.14.1) with pip$(if $(PYTHON),, was found on the PATH): install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	"$(BIN)/python" -c "$$fits" >/dev/null 2>&1 || "$$python" -m venv --clear --without-pip .venv || exit 1; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(BIN)/python" -m ensurepip --upgrade >/dev/null 2>&1 || true; \
	if "$(BIN)/python" -m pip --version >/dev/null 2>&1; then pip="$(BIN)/python -m pip"; else pip="$$python -m pip --python $(BIN)/python"; fi; \
	for info in .venv/lib/python3.*/site-packages/*.dist-info; do [ -e "$$info/INSTALLER" ] || rm -rf "$$info"; done; \
	echo "Installing the pinned packages into .venv with $$("$(BIN)/python" --version)"; \
	$$pip install --disable-pip-version-check --no-input --require-hashes -r requirements.txt || exit 1; \
	touch $(READY)
