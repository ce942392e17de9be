.PHONY: install test test-slow test-deepspeed lint format demo compat docs dist

install:
	pip install -c constraints.txt -e ".[dev]"

test:
	python -m pytest -n 2

test-slow:
	python -m pytest -n 2 --slow

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

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# make dist REPOSITORY=https://github.com/OWNER/NAME, with build and twine installed: the package's page shows the
# README, whose links have to be absolute there
dist:
	test -n "$(REPOSITORY)"
	rm -rf build/source && mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	sed -i -E -e 's#(!\[[^]]*\]\()docs/#\1$(REPOSITORY)/raw/HEAD/docs/#g' \
		-e 's#\]\(docs/#]($(REPOSITORY)/blob/HEAD/docs/#g' build/source/README.md
	python -m build --outdir dist build/source
	twine check --strict dist/*
