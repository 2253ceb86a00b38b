"""The verbs as a user meets them: help, mistakes, missing data, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from gan3d import launch

ROOT = Path(__file__).parent.parent
TINY = ["scale=mini", "data.resolution=16", "data.dataset.images=8", "model.generator.width=8", "model.batch_size=2",
        "model.generator.samples_per_ray=3", "model.discriminator={patch_size: 16, channels: 4}", "metrics.fakes=4",
        "metrics.reals=8", "metrics.kid_subset_size=4", "metrics.batch_size=4", "metrics.extractor.size=32",
        "logger=csv"]


def run(verb: str, *arguments: str, folder: Path, check: bool = True, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, str(ROOT / f"{verb}.py"), *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300, **settings)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.parametrize("verb", ["train", "eval", "render", "table", "prepare"])
@pytest.mark.smoke
def test_help_answers_without_importing_torch(verb, tmp_path):
    """Torch alone takes longer to import than help may take: -X importtime lists what was imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / f"{verb}.py"), "--help"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) > 200
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument, words", [
    ("modle=graf", ["modle", "Did you mean model?"]),
    ("model=graff", ["no such model", "Did you mean graf?", "pigan"]),
    ("data=fhq", ["Did you mean ffhq?"]),
    ("model.generator.widht=3", ["widht", "Did you mean model.generator.width?"]),
    ("lr_g=1", ["Did you mean model.lr_g?"]),
    ("budget_minuts=3", ["Did you mean budget_minutes?"]),
])
def test_a_wrong_key_stops_at_once_and_names_the_nearest(argument, words, tmp_path):
    done = run("train", argument, folder=tmp_path, check=False)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.smoke
def test_missing_data_says_why_where_and_what_to_do(tmp_path):
    done = run("train", "model=graf", "data=ffhq", folder=tmp_path, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for words in ("ffhq", str(tmp_path / "data" / "ffhq"), "prepare.py ffhq", "data.root="):
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []  # no run of nothing


def test_only_the_embedded_set_defaults_to_mini(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert launch.with_default_scale([]) == ["scale=mini"]
    assert launch.with_default_scale(["model=pigan"]) == ["model=pigan", "scale=mini"]
    assert launch.with_default_scale(["data=ffhq"]) == ["data=ffhq"]
    assert launch.with_default_scale(["scale=paper"]) == ["scale=paper"]
    assert launch.with_default_scale(["resume=runs/x"]) == ["resume=runs/x"]


def test_a_sweep_makes_a_run_of_every_job(tmp_path):
    run("train", "--multirun", "seed=0,1", *TINY, "model.total_steps=1", "name=sweep", folder=tmp_path)
    made = [p for p in (tmp_path / "runs").iterdir() if p.is_dir()]
    assert {p.name for p in made} == {"sweep-0", "sweep-1"}
    configs = [(p / "config.yaml").read_text() for p in made]
    assert sorted("seed: 1\n" in config for config in configs) == [False, True]


def test_sweeps_over_devices_are_refused_with_the_remedy(tmp_path):
    done = run("train", "--multirun", "seed=0,1", "trainer.devices=2", "trainer.accelerator=cpu", *TINY,
               folder=tmp_path, check=False)
    assert done.returncode != 0 and "trainer.devices=1" in done.stderr


def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(tmp_path):
    settings = [*TINY, "model.total_steps=12", "trainer.checkpoint.every_steps=2"]
    run("train", *settings, "name=whole", folder=tmp_path)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    endless = [sys.executable, str(ROOT / "train.py"), *settings, "name=killed", "model.total_steps=100000"]
    killed = subprocess.Popen(endless, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    last = tmp_path / "runs" / "killed-0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not (last.exists() and launch.progress(last)["step"] >= 4):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
        if last.exists() and launch.progress(last)["step"] > 10:
            pytest.skip("this machine is too fast to be killed in time")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    at = launch.progress(last)["step"]
    done = run("train", "resume=runs/killed-0", f"model.total_steps={max(12, at + 1)}", folder=tmp_path)
    assert "killed-0" in done.stdout

    if at < 12:
        whole = torch.load(tmp_path / "runs" / "whole-0" / "checkpoints" / "last.ckpt", weights_only=True)
        resumed = torch.load(last, weights_only=True)
        assert whole["progress"]["step"] == resumed["progress"]["step"] == 12
        for name, value in whole["state_dict"].items():
            assert torch.equal(value, resumed["state_dict"][name]), name
        for mine, theirs in zip(whole["optimizer_states"], resumed["optimizer_states"], strict=True):
            for index, state in mine["state"].items():
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][index][key])), key
    results = json.loads((tmp_path / "runs" / "killed-0" / "metrics.json").read_text())["results"]
    assert {r["step"] for r in results} == {0, max(12, at + 1)}


def test_train_eval_render_hand_over_to_each_other(tmp_path):
    run("train", *TINY, "model.total_steps=2", "name=small", folder=tmp_path)
    folder = tmp_path / "runs" / "small-0"
    for name in ("config.yaml", "samples.png", "depth.png", "orbit.mp4", "metrics.json", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    settings = [a for a in TINY if a.startswith("metrics.")]
    done = run("eval", "checkpoint=runs/small-0", *settings, "seed=7", folder=tmp_path)
    assert "fd_efficientnet_lite0" in done.stdout
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert {r["seed"] for r in results} == {0, 7}
    wanted = {"metric", "value", "step", "seconds", "protocol", "model", "data", "seed", "code", "device"}
    assert all(wanted <= set(r) for r in results)
    run("render", "checkpoint=runs/small-0", "what=[samples,interpolation]", "frames=3", "seeds=0-1", folder=tmp_path)
    run("train", "resume=runs/small-0", "budget_minutes=7", folder=tmp_path)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["config"]["model"]["budget_minutes"] == 7  # what refers to a changed value changes with it
    stray = {p.name for p in tmp_path.iterdir()} - {"runs", "data", "cache"}
    assert stray == set()


def authors_graf(folder: Path) -> Path:
    """A weight file as GRAF's authors write it, alone in a folder that nothing can be written to."""
    shapes = {f"pts_linears.{i}": (256, {0: 191, 5: 447}.get(i, 256)) for i in range(8)}
    shapes |= {"views_linears.0": (128, 411), "feature_linear": (256, 256), "alpha_linear": (1, 256),
               "rgb_linear": (3, 128)}
    state = {f"{name}.{kind}": torch.full(shape if kind == "weight" else shape[:1], 0.01)
             for name, shape in shapes.items() for kind in ("weight", "bias")}
    folder.mkdir()
    torch.save({"generator": state, "generator_test": state, "it": 7}, folder / "carla_128.pt")
    (folder / "carla_128.pt").chmod(0o444)
    folder.chmod(0o555)
    return folder / "carla_128.pt"


def test_pictures_of_an_official_file_go_to_a_run_named_after_it(tmp_path):
    file = authors_graf(tmp_path / "weights")
    run("render", "model=graf", "data=carla", f"checkpoint={file}", "what=[samples]", "seeds=0", "resolution=4",
        folder=tmp_path)
    assert list(file.parent.iterdir()) == [file]
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("carla_128-official-") and (made / "renders" / "samples.png").stat().st_size > 0
    done = run("render", "model=graf", "data=carla", "scale=mini", f"checkpoint={file}", folder=tmp_path, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(words in done.stderr for words in ("does not fit", "scale=paper", "radiance.trunk"))
    assert list((tmp_path / "runs").iterdir()) == [made]


def test_an_official_file_without_model_and_data_asks_for_them(tmp_path, monkeypatch):
    file = authors_graf(tmp_path / "weights")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with pytest.raises(launch.Stop, match="say model=… and data=… too"):
        launch.load_run(file)
    with pytest.raises(launch.Stop, match="no such file or run. Runs lie in runs/, one folder each.\n$"):
        launch.load_run(tmp_path / "missing.pt")
