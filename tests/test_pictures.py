import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from gan3d import pictures


@pytest.mark.smoke
def test_to_uint8_truncates_as_evaluation_does():
    x = torch.tensor([-1.2, -1.0, 0.0, 0.999, 1.0, 7.0]).reshape(1, 1, 6).expand(3, 1, 6)
    assert pictures.to_uint8(x)[0, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_magma_runs_from_black_to_pale_yellow_with_rising_lightness():
    colours = pictures.magma(torch.linspace(-0.5, 1.5, 401))
    assert torch.allclose(colours[0] * 255, torch.tensor([0.0, 0.0, 4.0]), atol=1e-3)
    assert torch.allclose(colours[-1] * 255, torch.tensor([252.0, 253.0, 191.0]), atol=1e-3)
    lightness = colours @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (lightness.diff() >= -2e-3).all()  # linear pieces between 8-bit colours: monotone up to rounding
    assert torch.allclose(pictures.magma(torch.tensor(1 / 16)) * 255, torch.tensor([10.0, 8.0, 34.0]), atol=1e-3)


def test_depth_range_ignores_outliers_and_what_is_transparent():
    depth, opacity = torch.linspace(2, 3, 1000).reshape(1, 20, 50), torch.ones(1, 20, 50)
    depth[0, 0, 0], depth[0, 19, 49] = -50, 900  # two pixels in a thousand
    opacity[0, 10] = 0.0
    near, far = pictures.depth_range(depth, opacity)
    assert near == pytest.approx(2.02, abs=0.01) and far == pytest.approx(2.98, abs=0.01)


def test_depth_colours_divide_by_opacity_and_fade_to_neutral():
    opacity = torch.tensor([[[1.0, 0.8, 0.0]]])
    colours = pictures.colour_depth(torch.tensor([[[2.0, 1.6, 0.0]]]), opacity, limits=(1, 3))[0, :, 0]  # surface at 2
    assert colours[:, 2].tolist() == [pictures.NEUTRAL] * 3
    expected = 0.8 * colours[:, 0].float() + 0.2 * pictures.NEUTRAL
    assert torch.allclose(colours[:, 1].float(), expected, atol=1)  # rounding to 8 bit


def test_nearer_is_brighter():
    colours = pictures.colour_depth(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)).float().mean(1)[0, 0]
    assert colours[0] > colours[1] > colours[2]


def test_depth_of_an_empty_picture_has_a_colour():
    assert (pictures.colour_depth(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)) == pictures.NEUTRAL).all()


def test_normal_towards_the_camera_is_blue_and_up_is_green():
    normals = torch.tensor([[[[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]])
    colours = pictures.colour_normals(normals, torch.ones(1, 1, 3))[0, :, 0].T.tolist()
    assert colours == [[128, 128, 255], [128, 255, 128], [255, 128, 128]]


@pytest.mark.smoke
def test_grid_places_pictures_row_by_row_with_white_between():
    batch = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 4)
    sheet = pictures.grid(batch, columns=3, pad=1)
    assert sheet.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    assert sheet[1, 1, 0] == 0 and sheet[1, 11, 0] == 2 and sheet[4, 6, 1] == 4
    assert (sheet[0] == 255).all() and (sheet[:, 5] == 255).all() and (sheet[4:6, 11:15] == 255).all()


def test_grid_is_nearly_square_by_itself():
    assert pictures.grid(torch.zeros(16, 3, 8, 8, dtype=torch.uint8), pad=0).shape == (32, 32, 3)
    assert pictures.grid(torch.zeros(8, 3, 8, 16, dtype=torch.uint8), pad=0).shape == (32, 32, 3)


def test_opacity_in_grey_goes_from_black_to_white():
    assert pictures.grey(torch.tensor([[0.0, 0.5, 1.0]]))[:, 0].tolist() == [[0, 128, 255]] * 3


def test_a_labelled_grid_keeps_its_pictures_and_has_ink_beside_each():
    batch = torch.full((6, 3, 64, 64), 200, dtype=torch.uint8)
    sheet = pictures.labelled_grid(batch, ["a", "b", "c"], ["first", "second"])
    top, left = sheet.shape[0] - 2 * 130 - 2, sheet.shape[1] - 3 * 130 - 2  # 64 is enlarged to 128
    assert torch.equal(sheet[top:, left:], pictures.grid(pictures.enlarge(batch, 2), 3))
    heads, sides = sheet[:top, left:], sheet[top:, :left]
    assert all((heads[:, 130 * i:130 * (i + 1)] < 100).any() for i in range(3))
    assert all((sides[130 * i:130 * (i + 1)] < 100).any() for i in range(2))
    assert (sheet[:top, :left] == 255).all()


def test_a_labelled_grid_needs_a_picture_for_every_cell():
    with pytest.raises(ValueError, match="2 rows of 2 columns"):
        pictures.labelled_grid(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), ["a", "b"], ["c", "d"])


def test_fit_repeats_pixels_up_to_the_side():
    small = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert torch.equal(pictures.fit(small, 4), pictures.enlarge(small, 2))
    assert pictures.fit(small, 5).shape == (1, 3, 5, 5)
    assert pictures.fit(small, 2) is small


def test_png_reads_back_the_same_and_leaves_no_other_file(tmp_path):
    picture = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = pictures.write_png(tmp_path / "new" / "a.png", picture)
    assert np.array_equal(np.array(Image.open(path)), picture.numpy())
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def frames(n, height, width):
    for i in range(n):
        frame = torch.full((height, width, 3), 40, dtype=torch.uint8)
        frame[:, : width // 2] = 40 + 20 * i
        yield frame


def test_video_plays_back_its_frames_enlarged_and_in_order(tmp_path):
    path = pictures.write_video(tmp_path / "a.mp4", frames(6, 8, 12), fps=12, minimum_side=64)
    read = iio.imread(path, plugin="pyav")
    assert read.shape == (6, 64, 96, 3)
    left = read[:, 16:48, 8:40].mean((1, 2, 3))
    assert np.abs(left - (40 + 20 * np.arange(6))).max() < 6  # H.264 is lossy
    info = iio.immeta(path, plugin="pyav")
    assert info["codec"] == "h264" and info["fps"] == 12 and info["video_format"] == "yuv420p"


def test_video_of_odd_size_is_padded(tmp_path):
    path = pictures.write_video(tmp_path / "a.mp4", frames(2, 33, 51), minimum_side=0)
    assert iio.imread(path, plugin="pyav").shape == (2, 34, 52, 3)


def broken():
    yield from frames(2, 64, 64)
    raise RuntimeError("the generator failed")


def test_a_video_that_fails_leaves_the_old_one_untouched(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the generator failed"):
        pictures.write_video(path, broken())
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_video_refuses_no_frames_and_frames_of_two_sizes(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        pictures.write_video(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="one size"):
        pictures.write_video(tmp_path / "a.mp4", [*frames(1, 8, 8), *frames(1, 8, 10)])
    assert not list(tmp_path.iterdir())


def test_gif_is_animated(tmp_path):
    path = pictures.write_gif(tmp_path / "a.gif", frames(3, 8, 12), fps=10)
    with Image.open(path) as gif:
        assert gif.n_frames == 3 and gif.size == (12, 8) and gif.info["duration"] == 100
