# The two commands: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo serve glue live-check live-growth bench perf-analyzer test lint help
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch  # first: a CPU build where pip is set up for one
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,ray,export,serve,bench,dev]'
	touch $@

demo: $(STAMP)  ## make data, train four tasks, export, serve on a real Triton, ask
	$(BIN)/python -m demo

serve: $(STAMP)  ## serve model_repository/ until Ctrl-C
	$(BIN)/espalier serve

glue: $(STAMP)  ## train, serve and score GLUE (hours on a CPU; goes on where it stopped): make glue [DATA=FOLDER]
	$(BIN)/python -m benchmarks.glue $(if $(DATA),--data $(DATA))

live-check: $(STAMP)  ## change tasks under load, kill the wiring and Triton, count what failed; writes docs/live.json
	$(BIN)/python -m benchmarks.live

live-growth: $(STAMP)  ## what 1 to 32 tasks in one repository cost; writes docs/live-growth.json and its plot
	$(BIN)/python -m benchmarks.live.growth

bench: $(STAMP)  ## what serving costs against today's way (about 80 minutes); writes docs/performance.md
	$(BIN)/espalier bench

perf-analyzer: $(STAMP)  ## install NVIDIA's perf_analyzer apart, into runs/perf_analyzer
	$(BIN)/python -m benchmarks.perf_analyzer

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint and all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile
