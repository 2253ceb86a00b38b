import dataclasses
import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gan3d.cost import Cost
from gan3d.launch import CONFIGS
from gan3d.poses import Spherical, Uniform
from metrics import tables
from metrics.results import Result, append_results

PUBLISHED = CONFIGS / "published" / "fid.yaml"
FAST = Result("fd_efficientnet_lite0", 210.25, 300, 330.0, "fd 512/1.024k lite/128 64² mem front", "graf", "cars", 0,
              "abc", "a processor, 2 threads")
FID = dataclasses.replace(FAST, metric="fid", value=31.75, protocol="fid 2k/2k inception/tf1 64² mem front")


def text(made):
    console = Console(width=300, file=io.StringIO())
    console.print(made)
    return console.file.getvalue()


def cells(printed, method):
    return [c.strip() for c in next(line for line in printed.splitlines() if f"│ {method} " in line).split("│")[1:-1]]


def test_published_figures_all_have_a_source_and_a_method_of_this_suite():
    published = tables.read_published(PUBLISHED)
    assert list(published["columns"].values()) == ["FFHQ 256²", "AFHQ 256²", "Carla 128²"]
    models = [method["model"] for method in published["methods"]]
    assert models == ["graf", "pigan", "giraffe", "gof", "stylenerf", "eg3d", "gram", "voxgraf"]
    figures = [f for m in published["methods"] for f in m["figures"]]
    assert figures and all(f["source"] and f["value"] > 0 for f in figures)


def test_a_published_figure_of_unknown_column_is_refused(tmp_path):
    path = tmp_path / "fid.yaml"
    path.write_text("columns: {a: A}\nmethods: [{model: m, name: M, figures: "
                    "[{column: b, value: 1, status: authors, source: s}]}]")
    with pytest.raises(ValueError, match="unknown column"):
        tables.read_published(path)


@pytest.mark.smoke
def test_fid_table_keeps_published_and_measured_and_unlike_measurements_apart(tmp_path):
    append_results(tmp_path / "graf-0" / "metrics.json", [dataclasses.replace(FAST, step=0, value=999.0), FAST, FID])
    append_results(tmp_path / "deep" / "new-0" / "metrics.json", [dataclasses.replace(FAST, model="new", value=150.0)])
    measured = tables.find_measured(tmp_path)
    assert [(m.run, m.result.value) for m in measured] == [("deep/new-0", 150.0), ("graf-0", 210.25), ("graf-0", 31.75)]
    printed = text(tables.fid_table(tables.read_published(PUBLISHED), measured))
    assert cells(printed, "GRAF") == ["GRAF", "71? / 73?", "", "41†", "210.2 (5.5 min)", "31.75 (5.5 min)"]
    assert cells(printed, "new") == ["new", "", "", "", "150 (5.5 min)", ""]
    assert cells(printed, "EG3D") == ["EG3D", "4.8†", "3.9?", "", "", ""]
    for heading in ("fd_efficientnet_lite0, measured", "cars, 5.5 min of training", FAST.protocol, FAST.device,
                    "fid, measured", FID.protocol, "FID, published"):
        assert heading in printed
    assert "999" not in printed


def test_fid_table_gives_every_run_its_own_value_and_every_device_its_own_column(tmp_path):
    for number, seconds in enumerate((60.0, 600.0)):
        append_results(tmp_path / f"graf-{number}" / "metrics.json",
                       [dataclasses.replace(FID, value=30.0 + number, seed=number, seconds=seconds)])
    append_results(tmp_path / "gpu" / "metrics.json", [dataclasses.replace(FID, value=20.0, device="a GPU")])
    printed = text(tables.fid_table(tables.read_published(PUBLISHED), tables.find_measured(tmp_path)))
    row = printed[printed.index("│ GRAF ") : printed.index("│ π-GAN ")]
    assert all(value in row for value in ("20 (5.5 min)", "30 (1.0 min)", "31 (10.0 min)"))
    assert "cars, 1.0–10.0 min of training" in printed and printed.count("fid, measured") == 2


def test_a_metric_can_be_chosen_and_a_damaged_record_is_left_out_with_a_warning(tmp_path):
    append_results(tmp_path / "graf-0" / "metrics.json", [FAST, FID])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    with pytest.warns(UserWarning, match="left out.*broken"):
        assert [m.result for m in tables.find_measured(tmp_path, "fid")] == [FID]


def test_a_table_without_measurements_says_so(tmp_path):
    assert "No measured results" in text(tables.fid_table(tables.read_published(PUBLISHED), []))


class Generator(torch.nn.Module):
    z_dim = 4

    def cost(self, resolution):
        return Cost(resolution**2, 24.0, 2e6, 3e9)

    def mapping(self, z, camera_condition=None):
        return z

    def synthesis(self, ws, camera, resolution):
        assert not self.training and ws.shape == (1, 4) and camera.camera_to_world.shape == (1, 4, 4)


def test_cost_table_multiplies_what_the_generator_counts_and_times_a_frame(monkeypatch):
    poses = Spherical(radius=2, azimuth=Uniform(0, 360), polar=Uniform(10, 80), fov_degrees=30)
    configs = SimpleNamespace(model=SimpleNamespace(generator=Generator(), poses=poses),
                              data=SimpleNamespace(resolution=64))

    def compose(name, overrides):
        if overrides[0] == "model=broken":
            raise KeyError("z_dim is missing")
        assert (name, overrides) == ("train", ["model=tiny", "data=cars"])
        return configs

    monkeypatch.setattr("hydra.compose", compose)
    monkeypatch.setattr("hydra.utils.instantiate", lambda node, **settings: node)
    made = tables.frame_cost("tiny", ["data=cars"], None, torch.device("cpu"), 2)
    assert made.rays == 4096 and made.flops == 4096 * 24 * 2e6 + 3e9 and made.seconds > 0
    broken = tables.frame_cost("broken", ["data=cars"], None, None, 2)
    printed = text(tables.cost_table([made, broken]))
    assert cells(printed, "tiny")[:-1] == ["tiny", "4,096", "24", "2", "3", "199.6"]
    assert "z_dim is missing" in cells(printed, "broken")[5]
    assert "data=cars, 64²" in printed and "ms/frame" in printed


def run_table(*arguments, folder):
    """`python table.py …` in a folder; exit status 9 if it has imported torch."""
    root, verb = str(CONFIGS.parent), str(CONFIGS.parent / "table.py")
    script = (f"import runpy, sys; sys.path.insert(0, {root!r}); sys.argv = {[verb, *arguments]!r}; "
              f"runpy.run_path({verb!r}, run_name='__main__'); sys.exit(9 if 'torch' in sys.modules else 0)")
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)


def test_table_verb_prints_writes_json_and_imports_no_torch(tmp_path):
    append_results(tmp_path / "runs" / "graf-0" / "metrics.json", [FID])
    done = run_table("json=out.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Carla 128²" in done.stdout and "31.75 (5.5 min)" in done.stdout
    numbers = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert numbers["measured"] == [{"run": "graf-0", **dataclasses.asdict(FID)}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "runs"]


def test_table_help_answers_at_once(tmp_path):
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(CONFIGS.parent / "table.py"), "--help"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "table=cost" in done.stdout
    assert time.perf_counter() - started < 10  # 1 s on an idle core; the machine may be busy


def test_an_unknown_table_is_named_and_the_right_ones_are_listed(tmp_path):
    done = run_table("table=speed", folder=tmp_path)
    assert done.returncode == 1 and "no such table. Choices: fid, cost" in done.stderr
