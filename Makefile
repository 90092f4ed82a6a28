# `make demo` and `make test` set everything up first; a second run finds it done.

.DEFAULT_GOAL := help
.PHONY: setup demo test evidence gpu-check lint format clean help

# pip's work is done once, and again when what it reads has changed.
STAMP := .venv/installed

setup: $(STAMP)  ## install the system libraries and the Python packages (into .venv)
	@:

$(STAMP): requirements.txt pyproject.toml
	@scripts/setup.sh $(STAMP)

demo: setup  ## run the whole pipeline on demonstrations it records itself, about 23 minutes on two cores
	@PATH="$(CURDIR)/.venv/bin:$$PATH" examples/quickstart.sh

# One thread a process (tests/conftest.py) and a process a core beat many threads: the models of the tests are tiny.
# The order of the files is that of tests/conftest.py.
test: setup lint  ## check the style and run all tests, 16 minutes on two cores
	@PATH="$(CURDIR)/.venv/bin:$$PATH" pytest -m "" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

evidence: setup  ## measure what docs/evidence lacks of the table whether video helps: days; goes on where it was stopped
	@.venv/bin/python examples/evidence.py --root runs/evidence --cells docs/evidence

gpu-check: setup  ## try training, sampling and speed on this machine's GPUs; writes gpu_check/
	@.venv/bin/python -m smolvla_shared.gpu_check

lint: setup  ## check style and format
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: setup  ## mend style and format
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:  ## remove the environment and the caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
