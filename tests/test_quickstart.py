"""The notebook of examples/: its code runs from top to bottom, and what is committed beside it is of a whole run."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from warm_python import python

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_quickstart_runs_from_top_to_bottom(tmp_path):
    """With few sentences, in one process."""
    program = "\n\n".join("".join(cell["source"]) for cell in code_cells())
    env = {**os.environ, "QUICKSTART_SAMPLES": "8", "MPLBACKEND": "agg"}
    run = subprocess.run([python(), "-c", program], capture_output=True, text=True, timeout=500, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "| learned before: icwsm14/movie |" in run.stdout and "| AdamW + replay |" in run.stdout
    assert (tmp_path / "quickstart" / "later" / "results.html").is_file()


def test_the_committed_outputs_are_those_of_one_whole_run():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert '"error"' not in outputs and "Warning" not in outputs and outputs.count('"image/png"') == 1
    assert not re.search(r"https?:|/(home|root|tmp|usr|work|opt)/", re.sub(r'"image/png": "[^"]*"', "", outputs))
