"""Building and choosing: a pinned backend, a missing or failing compiler, the cache. Each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gan3d.ops import extension

ROOT = Path(__file__).resolve().parents[2]
ASK = "import logging; logging.basicConfig(level='INFO'); from gan3d import ops; print('backend', ops.backend())"


def ask(code: str = ASK, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("GAN3D")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=keep | environment, text=True,
                          capture_output=True)


def test_importing_builds_nothing(tmp_path: Path) -> None:
    done = ask("import gan3d.ops", GAN3D_CACHE=str(tmp_path))
    assert done.returncode == 0 and not list(tmp_path.iterdir())


def test_the_reference_can_be_pinned(tmp_path: Path) -> None:
    done = ask(GAN3D_OPS="reference", GAN3D_CACHE=str(tmp_path))
    assert "backend reference" in done.stdout and not list(tmp_path.iterdir())


def test_without_a_compiler_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    code = ASK + "; import torch; ops.sh(torch.ones(1, 3), 1); ops.sh(torch.ones(1, 3), 2)"
    done = ask(code, CXX="no-such-compiler", GAN3D_CACHE=str(tmp_path))
    assert "backend reference" in done.stdout
    assert done.stderr.count("no C++ compiler `no-such-compiler`") == 1


def test_a_pinned_native_build_without_a_compiler_stops() -> None:
    done = ask(CXX="no-such-compiler", GAN3D_OPS="native")
    assert done.returncode != 0 and "no C++ compiler `no-such-compiler`" in done.stderr


def test_another_word_for_the_backend_is_refused() -> None:
    done = ask(GAN3D_OPS="fast")
    assert done.returncode != 0 and "native or reference" in done.stderr


@pytest.mark.skipif(extension.backend() == "reference", reason="no compiled ops: no C++ compiler")
def test_a_pinned_build_that_fails_shows_the_words_of_the_compiler(tmp_path: Path) -> None:
    (tmp_path / "broken.cpp").write_text("int f() { return undeclared_name; }\n")
    code = f"from pathlib import Path; from gan3d.ops import extension; extension.CSRC = Path({str(tmp_path)!r}); "
    done = ask(code + ASK, GAN3D_OPS="native", GAN3D_CACHE=str(tmp_path / "cache"))
    assert done.returncode != 0 and "undeclared_name" in done.stderr
    assert [p.suffix for p in (tmp_path / "cache" / "ops").iterdir()] == [".lock"]  # nothing half-built is left
    done = ask(code + ASK, GAN3D_CACHE=str(tmp_path / "cache"))
    assert "backend reference" in done.stdout and "GAN3D_OPS=native says why" in done.stderr


@pytest.mark.skipif(extension.backend() == "reference", reason="no compiled ops: no C++ compiler")
def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    (tmp_path / "small.cpp").write_text("#include <torch/library.h>\nTORCH_LIBRARY_FRAGMENT(gan3d, m) {}\n")
    code = (f"from pathlib import Path; from gan3d.ops import extension; extension.CSRC = Path({str(tmp_path)!r}); "
            "import logging; logging.basicConfig(); print(extension.build()[0])")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GAN3D")}
    environment["GAN3D_CACHE"] = str(tmp_path / "cache")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum(words.count("compiling") for _, words in said) == 1


def test_the_key_follows_sources_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension.backend() == "reference":
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(extension, "CSRC", tmp_path)
    (tmp_path / "a.h").write_text("1")
    one = extension.key(False)
    assert one == extension.key(False)
    (tmp_path / "a.h").write_text("2")
    assert one != extension.key(False)
