# Everything runs in a virtual environment of the project's own, made on first use by PYTHON3 (3.11 or newer).
PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PROFILE ?= digits

.PHONY: figures results benchmarks test smoke lab clean

figures: $(READY)
	$(PYTHON) -m dqar workbook --profile $(PROFILE) --figures figures --show

# Hours on two cores; an interrupted run continues. Its tables are committed, and `make figures` draws from them.
results: $(READY)
	$(PYTHON) -m dqar record --profile $(PROFILE)

# DiT-XL/2's shape with random weights; on a GPU: dqar benchmark --device cuda --dtype bfloat16.
benchmarks: $(READY)
	$(PYTHON) -m dqar benchmark

test: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m 'not rehearsal'

smoke: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m dqar record --profile smoke --work out/smoke
	OMP_NUM_THREADS=1 $(PYTHON) -m dqar workbook --profile smoke --jobs 2
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m rehearsal tests/test_rehearsal.py

lab: $(READY)
	$(PYTHON) -m pip install -q -c constraints.txt -e .[lab]
	$(PYTHON) -m jupyterlab --notebook-dir notebooks

clean:
	rm -rf out recorded/smoke $(VENV) dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch first and pinned exactly: only so does pip take the CPU wheel where one is offered.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dqar needs Python 3.11 or newer, and $(PYTHON3) is older: make PYTHON3=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON3) -m venv $(VENV) && $(PYTHON) -m pip --version >/dev/null || \
		{ echo "$(PYTHON3) can't make a virtual environment: install its venv and pip (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install -q -c constraints.txt -e .[dev]
	touch $@
