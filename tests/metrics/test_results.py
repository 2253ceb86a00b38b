import dataclasses
import json
import os
import subprocess
import sys

import pytest

from metrics import results
from metrics.results import Measurement, Recorder, Result, append_results, code_version, device_name, read_results

RESULT = Result("fid", 12.5, 1000, 60.0, "fid 2k/4k net/tf1 64² mem front", "graf", "cars", 0, "abc", "a processor")


@pytest.mark.smoke
def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "run" / "metrics.json"
    append_results(path, [RESULT])
    append_results(path, [dataclasses.replace(RESULT, step=2000)])
    assert read_results(path) == [RESULT, dataclasses.replace(RESULT, step=2000)]
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert " ".join(rows[0]) == "metric value step seconds protocol model data seed code device"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]  # nothing temporary is left


def test_no_file_is_no_results(tmp_path):
    assert read_results(tmp_path / "absent.json") == []


def test_a_failed_writing_leaves_the_old_record_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    append_results(path, [RESULT])

    def no_space(*arguments):
        raise OSError("no space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, no_space)
            with pytest.raises(OSError, match="no space"):
                append_results(path, [RESULT])
        assert read_results(path) == [RESULT]
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("content", ["", "{", '{"results": 3}', '{"results": [{"metric": "fid"}]}', "[]"])
def test_a_damaged_record_is_moved_aside_and_said_to_be(tmp_path, content):
    path = tmp_path / "metrics.json"
    for number in range(2):
        path.write_text(content)
        with pytest.raises(ValueError, match="metrics.json is no record"):
            read_results(path)
        with pytest.warns(UserWarning, match=f"metrics.json.damaged-{number}"):
            append_results(path, [RESULT])
        assert read_results(path) == [RESULT]
        assert (tmp_path / f"metrics.json.damaged-{number}").read_text() == content


def test_results_of_a_later_version_with_more_fields_can_be_read(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"results": [{**dataclasses.asdict(RESULT), "later": 1}]}))
    assert read_results(path) == [RESULT]


def measure(value, protocol="fid 2k"):
    return [Measurement("fid", value, protocol)]


def test_a_recorder_completes_measurements_and_replaces_what_is_measured_again(tmp_path):
    record = Recorder(tmp_path / "metrics.json", model="graf", data="cars", seed=3)
    record(measure(9.0), 100, 60.0004)
    record(measure(8.0, "fid 10k"), 100, 60.0)
    record(measure(7.0), 200, 120.0)
    record(measure(8.5), 100, 60.0)
    found = read_results(tmp_path / "metrics.json")
    assert [(r.value, r.protocol, r.step) for r in found] == [(8.0, "fid 10k", 100), (7.0, "fid 2k", 200),
                                                             (8.5, "fid 2k", 100)]
    assert {(r.model, r.data, r.seed, r.code, r.device) for r in found} == {
        ("graf", "cars", 3, code_version(), device_name())}


def test_a_resumed_run_drops_the_results_of_steps_that_are_taken_again(tmp_path, capsys):
    path = tmp_path / "metrics.json"
    first = Recorder(path, model="graf", data="cars", seed=0, since_step=0)
    for step in (0, 100, 200):
        first(measure(float(step)), step, float(step))
    resumed = Recorder(path, model="graf", data="cars", seed=0, since_step=150)
    assert len(read_results(path)) == 3  # nothing is lost before there is something new
    for step in (200, 300):
        resumed(measure(-1.0), step, float(step))
    assert [(r.step, r.value) for r in read_results(path)] == [(0, 0), (100, 100), (200, -1), (300, -1)]
    assert "1 results of later steps" in capsys.readouterr().err


def test_code_version_is_the_checkouts_and_marks_uncommitted_changes(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert code_version().startswith("gan3d ")  # not a checkout
    git("init")
    assert code_version().startswith("gan3d ")  # a checkout without a commit
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = code_version()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "a").write_text("2")
    assert code_version() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert code_version().startswith("gan3d ")


def test_device_name_says_processor_and_threads():
    import torch

    name = device_name()
    if torch.cuda.is_available():
        assert name == torch.cuda.get_device_name()
    else:
        assert name.rsplit(", ", 1)[1].split()[0] == str(torch.get_num_threads()) and len(name) > 12


def test_reading_results_imports_no_torch():
    script = "import sys, metrics.results, metrics.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=results.ROOT).returncode == 0
