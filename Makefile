# Everything a newcomer needs. Each target makes its own .venv on first use and installs with constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DOCS := .venv/installed-docs
export OMP_NUM_THREADS := 1

.PHONY: help demo weights test test-all test-fast check docs bench clean

help:
	@echo "make demo        train real networks with AdamW and NFNOptimizer side by side"
	@echo "make weights     predict generalization, edit and classify images, find tickets, from weights, quickly"
	@echo "make test        run the tests; of slow ones that are repeated over many networks, a fixed sample"
	@echo "make test-all    run all tests"
	@echo "make test-fast   run the fast ones"
	@echo "make check       ruff and mypy --strict"
	@echo "make docs        build the documentation (build/docs/index.html)"
	@echo "make bench       measure the cost of a step (writes benchmarks/results/)"
	@echo "make clean       remove .venv, caches and runs"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[check]"
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/replace_adam.py

weights: $(INSTALLED)
	$(BIN)/python examples/weights/predict_generalization.py --quick
	$(BIN)/python examples/weights/edit_images.py --quick
	$(BIN)/python examples/weights/classify_images.py --quick
	$(BIN)/python examples/weights/find_winning_tickets.py --quick

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q --sample

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED_DOCS)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_cost.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
