# Each target first makes .venv ready (scripts/setup), where pyproject.toml changed since.
# ARGS goes to the command: make demo ARGS="--models mixtral", make test ARGS=tests/test_route.py

PY := .venv/bin/python

.PHONY: demo test lint format bench-cpu families clean

demo: .venv/demo.stamp
	$(PY) examples/demo.py $(ARGS)

test: .venv/dev.stamp
	$(PY) -m pytest -q -n auto --maxprocesses 8 $(ARGS)

lint: .venv/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-cpu: .venv/demo.stamp
	$(PY) benchmarks/bench_cpu.py $(ARGS)

families: .venv/demo.stamp
	$(PY) benchmarks/families.py $(ARGS)

.venv/%.stamp: pyproject.toml scripts/setup
	@scripts/setup $*

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
