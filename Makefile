# Everything runs in a virtual environment of the project's own, made on first use.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PROFILE ?= digits

.PHONY: figures results benchmarks test smoke lab clean

figures: $(READY)
	$(PYTHON) -m dqar workbook --profile $(PROFILE) --out out/$(PROFILE) --figures figures

# Hours on two cores; an interrupted run continues. Its tables are committed, and `make figures` draws from them.
results: $(READY)
	$(PYTHON) -m dqar record --profile $(PROFILE)

# DiT-XL/2's shape with random weights; on a GPU: PYTHON -m dqar benchmark --device cuda --dtype bfloat16.
benchmarks: $(READY)
	$(PYTHON) -m dqar benchmark

test: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest

smoke: $(READY)
	$(PYTHON) -m dqar record --profile smoke --work out/smoke
	$(PYTHON) -m dqar workbook --profile smoke --out out/smoke

lab: $(READY)
	$(PYTHON) -m pip install -q -c constraints.txt -e .[lab]
	$(PYTHON) -m jupyterlab --notebook-dir notebooks

clean:
	rm -rf out recorded/smoke $(VENV) .pytest_cache .ruff_cache *.egg-info

# torch first and pinned exactly: only so does pip take the CPU wheel where one is offered.
$(READY): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -q -c constraints.txt -e .[dev,peers]
	touch $@
