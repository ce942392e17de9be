.PHONY: install test test-deepspeed lint format demo compat

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	python -m pytest -n 2

test-deepspeed:
	python3.11 -m venv /tmp/classp_hf_deepspeed
	/tmp/classp_hf_deepspeed/bin/pip install -c constraints.txt setuptools wheel ninja -e ".[test]"
	DS_BUILD_OPS=0 /tmp/classp_hf_deepspeed/bin/pip install --no-build-isolation deepspeed
	PATH=/tmp/classp_hf_deepspeed/bin:$$PATH python -m pytest tests/test_deepspeed.py

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
