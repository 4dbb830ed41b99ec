# Every target but clean works from a bare checkout: it makes .venv first, or brings it up to date.

PYTHON ?= python3.11
HOST_VERSION ?= 0.5.23
MODEL ?= examples/tiny-llada2
HOST ?= 127.0.0.1
PORT ?= 30000
ARGS ?=
# Processes that tests run in. A server on the CPU is mostly one busy core.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

BIN := .venv/bin
# There, and newer than pyproject.toml, exactly when .venv holds what it asks for and this release of SGLang.
STAMP := .venv/.installed-$(HOST_VERSION)

.PHONY: venv serve test test-all lint bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[host,test]' 'sglang==$(HOST_VERSION)'
	rm -f .venv/.installed*
	touch $@

# exec, so that Ctrl-C and signals reach the server itself. ARGS takes further flags of the host.
serve: venv
	exec $(BIN)/python -m sglang.launch_server --model-path $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

# And the tests that take minutes each and show what others show in part.
test-all: lint
	$(PYTEST) -m "long or not long"

# About ten minutes; each prints a table and, as its last line, a record for `python -m bench.compare`.
bench: venv
	$(BIN)/python -m bench.step
	$(BIN)/python -m bench.decode_steps
	$(BIN)/python -m bench.select --positions 16 128 --repeats 3
	$(BIN)/python -m bench.prefill --most 'ours=8192' 'like for like=2016' 'as it comes=2016'
	$(BIN)/python -m bench.serve --repeats 2 --only chat prompt shared mix
	$(BIN)/python -m bench.roofline

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
