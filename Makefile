.PHONY: install test lint format demo

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	python -m pytest -n 2

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

demo:
	accelerate launch recipes/sentiment_sequence.py
