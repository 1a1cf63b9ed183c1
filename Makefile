# Everything a newcomer needs. Each target makes its own .venv on first use and installs with constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
export OMP_NUM_THREADS := 1

.PHONY: help demo test check bench clean

help:
	@echo "make demo    train real networks with AdamW and NFNOptimizer side by side (three minutes)"
	@echo "make test    run the tests"
	@echo "make check   ruff and mypy --strict"
	@echo "make bench   measure the cost of a step (writes benchmarks/results/)"
	@echo "make clean   remove .venv, caches and runs"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[check]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/replace_adam.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_cost.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
