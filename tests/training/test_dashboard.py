import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from toy import ToyStream, toy_module, toy_trainer

from gan3d import pictures, views
from gan3d.rays import Bounds
from gan3d.training import dashboard, loggers
from gan3d.training.dashboard import Dashboard
from gan3d.training.loggers import MetricsFile, build_loggers, read_metrics, tensorboard_logger, wandb_logger
from gan3d.training.progress import Pace, Progress, clock, fraction_done, seconds_left, status

SMALL = dict(every_minutes=None, max_share=1, samples=3, orbit_latents=2, orbit_frames=8)


def shrunk(path, side: int) -> np.ndarray:
    """A picture that was enlarged by a whole factor, at its own size `side` again (its shorter one)."""
    picture = np.array(Image.open(path))
    factor, rest = divmod(min(picture.shape[:2]), side)
    assert rest == 0 and factor * side >= 512
    small = picture[::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), picture)
    return small



def train(folder: Path, steps: int = 4, logger=False, module=None, **settings):
    module = module or toy_module(steps)
    board = Dashboard(folder=folder, **(SMALL | settings))
    toy_trainer(board, logger=logger, log_every_n_steps=1).fit(module, ToyStream(4))
    return module, board


class RandomStateGuard(pl.Callback):
    """Remembers the random state before another callback's hook and compares it afterwards."""

    def __init__(self, watched):
        self.watched, self.compared = watched, 0
        for name in ("on_train_start", "on_train_batch_end", "on_train_end"):
            setattr(watched, name, self.guard(getattr(watched, name)))

    def guard(self, hook):
        def guarded(*args):
            before = torch.get_rng_state()
            hook(*args)
            assert torch.equal(torch.get_rng_state(), before)
            self.compared += 1

        return guarded


@pytest.mark.smoke
def test_the_random_state_is_the_same_before_and_after_every_hook(tmp_path):
    board = Dashboard(folder=tmp_path, **(SMALL | dict(every_steps=1)))
    guard = RandomStateGuard(board)
    toy_trainer(board).fit(toy_module(3), ToyStream(4))
    assert guard.compared == 5


def test_training_with_a_dashboard_gives_the_same_weights(tmp_path):
    plain = toy_module(5, noise=0.1)
    toy_trainer().fit(plain, ToyStream(4))
    watched, _ = train(tmp_path, module=toy_module(5, noise=0.1), every_steps=2)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_the_run_folder_fills_with_pictures_of_the_same_objects(tmp_path):
    module, _ = train(tmp_path, steps=5, every_steps=2)
    names = [f"step_{step:06d}.png" for step in (0, 2, 4, 5)]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == names
    assert sorted(p.name for p in (tmp_path / "depth").iterdir()) == names
    z = views.draw_latents(module.generator_ema, range(3))
    seen, _ = views.samples(module.generator_ema, module.poses, z, module.resolution_now())
    expected = pictures.grid(pictures.to_uint8(seen.rgb))
    assert np.array_equal(shrunk(tmp_path / "samples.png", min(expected.shape[:2])), expected.numpy())
    assert not np.array_equal(np.array(Image.open(tmp_path / "samples" / names[1])), expected.numpy())
    assert iio.improps(tmp_path / "orbit.mp4", plugin="pyav").shape[0] == 8


def test_a_resumed_run_does_not_draw_at_once(tmp_path):
    module = toy_module(2)
    module.step = 2
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    Dashboard(folder=tmp_path, **SMALL).on_train_start(trainer, module)
    assert not list(tmp_path.iterdir())


def test_other_processes_draw_nothing(tmp_path):
    board, trainer, module = Dashboard(folder=tmp_path, **SMALL), SimpleNamespace(is_global_zero=False), toy_module(1)
    board.on_train_start(trainer, module)
    board.on_train_end(trainer, module)
    assert not list(tmp_path.iterdir())


def test_slow_pictures_are_drawn_less_often(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
    board = Dashboard(folder=tmp_path, every_minutes=1.0, max_share=0.1)
    board._drawn_at, board._took = 100.0, 2.0
    now[0] = 159.0
    assert not board._due(7)
    now[0] = 160.0
    assert board._due(7)
    board._took = 10.0  # 10 s of pictures want 90 s without
    now[0] = 189.0
    assert not board._due(7)
    now[0] = 191.0
    assert board._due(7)


def test_an_orbit_that_would_take_too_long_gets_fewer_frames_but_turns_as_slowly(tmp_path):
    train(tmp_path, orbit_frames=32, fps=16.0, orbit_seconds=0)
    path = tmp_path / "orbit.mp4"
    assert iio.improps(path, plugin="pyav").shape[0] == 8
    assert iio.immeta(path, plugin="pyav")["fps"] == 4


def test_a_full_disk_at_the_orbit_does_not_lose_the_run(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(pictures, "write_video", full)
    module, _ = train(tmp_path)
    assert module.step == 4 and "no orbit: no space left" in capsys.readouterr().out


def test_every_scalar_is_in_the_metrics_file_under_our_step(tmp_path):
    module, _ = train(tmp_path, steps=4, logger=[MetricsFile(tmp_path)])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for name in ("train/loss_g", "train/loss_d", "perf/images_per_second", "perf/peak_memory_mb"):
        assert math.isfinite(lines[-1][name]), name
    assert lines[-1]["perf/images_per_second"] == pytest.approx(module.images_seen / module.seconds, rel=1e-3)
    assert 50 < lines[-1]["perf/peak_memory_mb"] < 100_000
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 4 and "train/loss_g" in header.split(",")


def test_a_half_written_line_is_cut_off_when_the_run_goes_on(tmp_path):
    file = MetricsFile(tmp_path)
    file.log_metrics({"a": 1.0}, step=1)
    with open(file.path, "a") as raw:
        raw.write('{"step": 2, "a": 0.')
    assert [line["a"] for line in read_metrics(file.path)] == [1.0]
    resumed = MetricsFile(tmp_path)
    resumed.log_metrics({"a": torch.tensor(3.0)}, step=2)
    assert [line["a"] for line in read_metrics(file.path)] == [1.0, 3.0]


def test_steps_that_are_run_again_count_as_the_later_run_has_them(tmp_path):
    file = MetricsFile(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)):
        file.log_metrics({"a": value}, step=step)
    file.log_metrics({"b": 5.0}, step=2)
    lines = read_metrics(file.path)
    assert [(line["step"], line["a"]) for line in lines] == [(1, 1.0), (2, 20.0), (3, 3.0)] and lines[1]["b"] == 5.0


def test_nan_and_infinity_stay_valid_json(tmp_path):
    MetricsFile(tmp_path).log_metrics({"a": math.nan, "b": math.inf, "c": 1.0}, step=1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["a"] is None and line["b"] is None and line["c"] == 1.0
    MetricsFile(tmp_path).finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1].endswith(",,1.0")


def with_bounds(steps):
    module = toy_module(steps)
    module.generator_ema.bounds = Bounds(0.5, 2.0)
    return module


def test_tensorboard_shows_pictures_histograms_and_the_orbit(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, steps=3, module=with_bounds(3), logger=[tensorboard_logger(folder=tmp_path)])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"image/samples", "image/depth", "video/orbit"}
    assert set(events.Tags()["histograms"]) == {"hist/logit_real", "hist/logit_fake", "hist/raw_density"}
    assert [event.step for event in events.Images("image/samples")] == [0, 3]
    shown = np.array(Image.open(io.BytesIO(events.Images("image/samples")[-1].encoded_image_string)))
    assert np.array_equal(shown, shrunk(tmp_path / "samples.png", min(shown.shape[:2])))
    with Image.open(io.BytesIO(events.Images("video/orbit")[0].encoded_image_string)) as gif:
        assert gif.n_frames == 8


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user who never logged in to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "run"


def test_wandb_is_offline_for_who_is_not_logged_in_and_gets_pictures(nobody, monkeypatch, capsys):
    import wandb

    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("W&B asked"))
    made = build_loggers({"seed": 3, "logger": {
        "metrics_file": {"_target_": "gan3d.training.loggers.MetricsFile"},
        "wandb": {"_target_": "gan3d.training.loggers.wandb_logger", "project": "test"}}}, nobody)
    assert [type(logger).__name__ for logger in made] == ["MetricsFile", "WandbLogger"]
    assert made[1].experiment.config["seed"] == 3 and made[1].experiment.offline
    train(nobody, steps=2, module=with_bounds(2), logger=made)
    wandb.finish()
    assert "W&B: offline" in capsys.readouterr().out
    media = next((nobody / "wandb").glob("offline-run-*")) / "files" / "media"
    picture = np.array(Image.open(max((media / "images" / "image").glob("samples_*.png"))))
    assert np.array_equal(picture, shrunk(nobody / "samples.png", min(picture.shape[:2])))
    (video,) = (media / "videos" / "video").glob("orbit_*.mp4")
    assert video.read_bytes() == (nobody / "orbit.mp4").read_bytes()


def test_wandb_that_cannot_start_leaves_the_run_alone(nobody, monkeypatch, capsys):
    import wandb

    def broken(**kwargs):
        raise wandb.errors.CommError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    assert wandb_logger(folder=nobody, project="test", mode="online") is None
    told = capsys.readouterr().out
    assert "did not start online: no service" in told and "goes on without W&B" in told


@pytest.mark.parametrize("login, mode", [("nothing", "offline"), ("key", "online"), ("netrc", "online"),
                                         ("other netrc", "offline"), ("env", "disabled")])
def test_wandb_mode_follows_the_login(nobody, monkeypatch, login, mode):
    home = nobody.parent / "home"
    home.mkdir()
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    elif login == "env":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    elif login.endswith("netrc"):
        host = "api.wandb.ai" if login == "netrc" else "example.org"
        (home / ".netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    tried = []
    monkeypatch.setattr(loggers, "_start_wandb", lambda folder, project, mode: tried.append(mode))
    wandb_logger(folder=nobody, project="test")
    assert tried == [mode]


def test_a_resumed_run_keeps_its_wandb_id(nobody):
    import wandb

    first = wandb_logger(folder=nobody / "a", project="test", mode="disabled")
    assert first is not None
    kept = (nobody / "a" / "wandb_id.txt").read_text()
    wandb_logger(folder=nobody / "a", project="test", mode="disabled")
    assert (nobody / "a" / "wandb_id.txt").read_text() == kept
    wandb.finish()


def module_at(step=50, total=200, minutes=None, seconds=10.0, images=1600):
    return SimpleNamespace(step=step, total_steps=total, budget_minutes=minutes, seconds=seconds, images_seen=images)


def test_pace_is_that_of_the_last_window():
    pace = Pace(window=10)
    assert math.isnan(pace.images_per_second)
    for second in range(100):
        pace.update(second, second if second < 50 else 50 + 4 * (second - 50), 8 * second)
    assert pace.steps_per_second == pytest.approx(4) and pace.images_per_second == pytest.approx(8)


@pytest.mark.smoke
def test_the_end_is_whichever_of_steps_and_minutes_comes_first():
    assert seconds_left(module_at(), 5) == 30 and fraction_done(module_at()) == 0.25
    assert seconds_left(module_at(minutes=0.5), 5) == 20
    assert fraction_done(module_at(minutes=0.5)) == pytest.approx(1 / 3)
    assert seconds_left(module_at(minutes=10), 5) == 30
    assert seconds_left(module_at(total=None), 5) == math.inf and fraction_done(module_at(total=None)) == 0
    assert seconds_left(module_at(minutes=1), math.nan) == 50


def test_clock_reads_well():
    assert [clock(s) for s in (7, 200, 7387, 4 * 86400 + 7300, math.inf)] == ["0:07", "3:20", "2:03:07", "4d 02h", "?"]


def test_status_line_says_where_the_run_is():
    pace = Pace()
    pace.update(0, 0, 0)
    pace.update(10, 50, 1600)
    line = status(module_at(), pace, {"train/loss_g": torch.tensor(0.712), "train/loss_d": 1.4, "fid": 43.21})
    assert line == "step 50/200  25%  1.6 kimg  160 img/s  loss_g 0.712  loss_d 1.4  fid 43.2  left 0:30"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_lines_in_a_log_file_and_the_latest_metric():
    out, evaluation = io.StringIO(), SimpleNamespace(history=[(0, "fid", 300.0), (2, "fid", 41.5), (2, "kid", 0.1)])
    toy_trainer(Progress(evaluation, every_seconds=0, stream=out)).fit(toy_module(4), ToyStream(4))
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert re.match(r"step 4/4  100%  0.0 kimg  .* img/s  loss_g \S+  loss_d \S+  fid 41.5  left 0:00", lines[-1])


def test_progress_is_quiet_in_between():
    out = io.StringIO()
    toy_trainer(Progress(every_seconds=1000, stream=out)).fit(toy_module(4), ToyStream(4))
    assert len(out.getvalue().splitlines()) == 1


def test_progress_draws_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    before = sys.stdout, sys.stderr
    toy_trainer(Progress(stream=out)).fit(toy_module(4), ToyStream(4))
    assert "step 4/4" in out.getvalue() and "━" in out.getvalue()
    assert (sys.stdout, sys.stderr) == before  # the bar lets go of the streams it had taken
