import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from metrics.image import psnr, ssim


def noise(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.smoke
def test_psnr_is_the_mean_over_pictures_and_not_of_the_pooled_error():
    target = torch.full((2, 3, 4, 4), 0.5)
    prediction = target + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert float(psnr(prediction, target)) == pytest.approx((20 + 40) / 2, abs=1e-3)  # float32 squares of 0.01


def test_psnr_of_equal_pictures_is_infinite_and_predictions_are_clamped():
    assert psnr(torch.full((1, 3, 4, 4), 1.7), torch.ones(1, 3, 4, 4)) == torch.inf


def test_ssim_of_equal_pictures_is_one_and_of_opposite_ones_negative():
    image = noise((2, 3, 20, 20), seed=0)
    assert float(ssim(image, image)) == pytest.approx(1, abs=1e-12)
    assert ssim(1 - image, image) < -0.5


def test_ssim_of_two_flat_pictures_is_the_closed_form():
    a, b = 0.3, 0.7
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    found = ssim(*(torch.full((1, 3, 12, 12), x, dtype=torch.float64) for x in (a, b)))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_ssim_agrees_with_its_definition_window_by_window():
    a, b = noise((1, 1, 17, 23), seed=1), noise((1, 1, 17, 23), seed=2)
    window = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(window, window) / window.sum() ** 2

    def mean(x):
        return correlate(x, window)[5:-5, 5:-5]

    x, y = a[0, 0].numpy(), b[0, 0].numpy()
    vx, vy, cov = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2, mean(x * y) - mean(x) * mean(y)
    top = (2 * mean(x) * mean(y) + 1e-4) * (2 * cov + 9e-4)
    expected = (top / ((mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (vx + vy + 9e-4))).mean()
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-9)


def test_ssim_agrees_with_torchmetrics_up_to_its_borders():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = noise((2, 3, 64, 64), seed=3)
    b = (0.7 * a + 0.3 * noise((2, 3, 64, 64), seed=4)).clamp(0, 1)
    theirs = structural_similarity_index_measure(a, b, data_range=1.0)
    assert float(ssim(a, b)) == pytest.approx(float(theirs), abs=2e-3)  # they pad by reflection and crop the rest


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="11×11"):
        ssim(torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20))
