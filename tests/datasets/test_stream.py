"""The training order: deterministic, resumable, the same for any number of workers, shared among ranks."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import images
from datasets.images import ImageCollection
from datasets.stream import ImageStream, sequence
from gan3d.cameras import Camera, intrinsics_from_fov, look_at, mirror, sphere_point


@pytest.fixture
def pictures(tmp_path):
    """Ten posed pictures; the red of picture i is i on the left half and i + 100 on the right."""
    eye = sphere_point(torch.linspace(0, 5, 10), torch.linspace(0.5, 1.5, 10))
    world, lens = look_at(eye, torch.zeros(3)), intrinsics_from_fov(30.0)
    labels = []
    for index in range(10):
        image = np.zeros((4, 4, 3), np.uint8)
        image[:, :2, 0], image[:, 2:, 0] = index, index + 100
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        labels.append([f"{index}.png", [*world[index].flatten().tolist(), *lens.flatten().tolist()]])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return ImageCollection(root=tmp_path, resolution=4, name="toy")


def stream(pictures, batch=4, **changes):
    size = batch if callable(batch) else lambda step: batch
    return ImageStream(pictures, **{"batch_size": size, "seed": 1, "flip": False, **changes})


def take(source, count):
    return list(itertools.islice(source, count))


def shown(batch):
    return (batch.images[:, 0, 0].amin(-1)).tolist()


def same(one, other):
    return torch.equal(one.images, other.images) and all(map(torch.equal, one.camera, other.camera))


@pytest.mark.smoke
def test_every_epoch_shows_every_picture_once(pictures):
    order = [i for batch in take(stream(pictures, batch=5), 6) for i in shown(batch)]
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_several_epochs(pictures):
    (batch,) = take(stream(pictures, batch=25), 1)
    assert sorted(shown(batch)[:20]) == sorted([*range(10), *range(10)]) and len(batch.images) == 25


@pytest.mark.smoke
def test_resuming_gives_the_batches_that_would_have_come(pictures):
    growing = lambda step: 4 if step < 3 else 6  # noqa: E731
    whole = take(stream(pictures, growing, flip=True), 9)
    by_start = take(stream(pictures, growing, flip=True, start_step=5), 4)
    interrupted = stream(pictures, growing, flip=True)
    take(interrupted, 5)
    state = interrupted.state_dict()
    assert state == {"step": 5}
    resumed = stream(pictures, growing, flip=True)
    resumed.load_state_dict(state)
    assert all(map(same, whole[5:], by_start)) and all(map(same, whole[5:], take(resumed, 4)))
    assert [len(batch.images) for batch in whole] == [4] * 3 + [6] * 6


def test_seeds_give_different_orders_and_runs_the_same(pictures):
    one, again, other = (take(stream(pictures, seed=seed), 3) for seed in (1, 1, 2))
    assert all(map(same, one, again)) and [shown(b) for b in one] != [shown(b) for b in other]


def test_a_flip_mirrors_picture_and_camera_together(pictures):
    seen = set()
    for batch in take(stream(pictures, flip=True, batch=10), 8):
        for image, pose, lens in zip(batch.images, *batch.camera, strict=True):
            index = int(image[0].min())
            flipped = bool(image[0, 0, 0] > image[0, 0, -1])
            camera = pictures.cameras[index]
            expected = mirror(camera) if flipped else camera
            assert torch.equal(pose, expected.camera_to_world) and torch.equal(lens, expected.intrinsics)
            seen.add((index, flipped))
    assert len(seen) == 20  # each picture both ways; eight fair coins, the seed is fixed


def test_flips_change_neither_the_order_nor_each_other(pictures):
    plain, flipped = (take(stream(pictures, flip=flip), 5) for flip in (False, True))
    assert [shown(b) for b in plain] == [shown(b) for b in flipped]
    assert all(bool((b.images[:, 0, 0, 0] < 100).all()) for b in plain)


@pytest.mark.parametrize("posed", [True, False])
def test_workers_give_the_same_batches(pictures, posed):
    if not posed:
        pictures.cameras = None
    here, there = (take(stream(pictures, flip=True, workers=workers, start_step=2), 6) for workers in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert same(one, other) if posed else one.camera is other.camera is None


def test_ranks_share_the_global_batch(pictures):
    (whole,) = take(stream(pictures, batch=6), 1)
    parts = [take(stream(pictures, batch=6, rank=rank, world_size=3), 1)[0] for rank in range(3)]
    assert [len(part.images) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.camera.camera_to_world for part in parts]), whole.camera.camera_to_world)


@pytest.mark.parametrize("batch", [5, 2])
def test_a_batch_that_does_not_divide_among_ranks_is_refused(pictures, batch):
    uneven = stream(pictures, batch=batch, world_size=4)
    with pytest.raises(ValueError, match=f"batch of {batch} does not divide among 4 ranks"):
        next(iter(uneven))


def test_the_global_random_state_is_left_alone(pictures):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    take(stream(pictures, flip=True), 3)
    take(stream(pictures, flip=True, workers=1), 2)
    assert torch.equal(torch.rand(2), expected)


def test_a_stand_in_brings_its_own_camera(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(images, "VERIFY_IMAGES", 0)
    (tmp_path / "3.png").write_bytes(b"")
    damaged = ImageCollection(root=tmp_path, resolution=4, name="toy")
    with pytest.warns(UserWarning, match="3.png"):
        (batch,) = take(sequence(damaged, 10), 1)
    assert shown(batch)[3] == 4
    assert torch.equal(batch.camera.camera_to_world[3], damaged.cameras.camera_to_world[4])


@pytest.mark.parametrize("workers", [0, 1])
def test_sequence_shows_all_in_order_and_ends(pictures, workers):
    batches = list(sequence(pictures, 4, workers=workers))
    assert [i for batch in batches for i in shown(batch)] == list(range(10))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    assert isinstance(batches[0].camera, Camera)


def test_a_late_start_is_found_at_once(pictures):
    far = stream(pictures, lambda step: 32 if step < 100_000 else 64, start_step=1_000_000)
    assert far.position(1_000_000) == 32 * 100_000 + 64 * 900_000
    assert len(next(iter(far)).images) == 64 and len(far) == 2**31
