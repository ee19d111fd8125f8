# Every target is safe to repeat. Needs make, git and python3.11 or newer; installs into .venv only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UI_PORT ?= 5000
UI_STORE ?= runs/mlflow.db

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: setup pretrain compare test test-long test-all check cluster-check bench soak chaos ui gpu-check lock

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml hvp_ray/__init__.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"hvp_ray needs Python 3.11 to 3.13, but $(PYTHON) is {v[0]}.{v[1]}; choose another: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed: install your system's package python3-venv" >&2; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --compile-bytecode requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

pretrain: setup
	$(BIN)/python pipelines/pretrain.py simsiam-digits

compare: setup
	$(BIN)/python pipelines/compare.py simsiam-digits --training.epochs 20 --metric knn5shot_top1

# tests/conftest.py decides which tests share a process.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-long: setup
	$(BIN)/python -m pytest -m long

test-all: test test-long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell hvp_ray pipelines tests docs README.md CHANGELOG.md CONTRIBUTING.md
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/mkdocs build --quiet --strict --site-dir site

cluster-check: setup
	cluster/validate.sh
	cluster/netns_cluster.sh
	$(BIN)/python benchmarks/chaos.py --minutes $(or $(CHAOS_MINUTES),10)
	cluster/compose_check.sh

bench: setup
	$(BIN)/python benchmarks/step.py --json benchmarks/results/step.jsonl
	$(BIN)/python benchmarks/row_reuse.py --json benchmarks/results/row-reuse.jsonl
	$(BIN)/python benchmarks/render.py $(if $(DATA),--data $(DATA),--images 16 --repeats 3) --json benchmarks/results/render.jsonl
	$(BIN)/python benchmarks/stream.py $(if $(DATA),--data $(DATA),--images-per-step 48) --json benchmarks/results/stream.jsonl
	$(BIN)/python benchmarks/sizing.py $(if $(DATA),--data $(DATA)) --images-per-step 48 --steps 10 --json benchmarks/results/sizing.jsonl
	$(BIN)/python benchmarks/headroom.py $(if $(DATA),--data $(DATA)) --json benchmarks/results/headroom.jsonl
	$(BIN)/python benchmarks/data.py --images 100000 --mib 300 --json benchmarks/results/data.jsonl

soak: setup
	$(BIN)/python benchmarks/soak.py $(if $(KILLS),--kills $(KILLS)) $(if $(STEPS),--steps $(STEPS))

chaos: setup
	$(BIN)/python benchmarks/chaos.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(RUN),--run $(RUN))

ui: setup
	$(BIN)/hvp-ray ui --store "$(UI_STORE)" --port $(UI_PORT)

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py $(if $(DATA),--data $(DATA))

lock:
	$(BIN)/uv pip compile pyproject.toml --group dev --all-extras --python-version 3.11 --universal --no-emit-index-url \
		--no-header --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --group server --extra dali --extra mlflow --python-version 3.11 --universal --no-emit-index-url \
		--no-header --constraint requirements.lock --output-file cluster/requirements.lock

export NO_MKDOCS_2_WARNING := 1
.PHONY: docs
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --quiet --site-dir site
	@echo "open site/index.html"
