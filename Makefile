.PHONY: install test lint format demo compat docs

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	python -m pytest -n 2

compat:
	python3.11 tests/compat.py

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

demo:
	accelerate launch recipes/sentiment_sequence.py

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
