"""mixup and CutMix: images, labels, weights and areas."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, ks_2samp, kstest
from torchvision.transforms.v2 import CutMix

from pipeline.training.mixing import MixDraws, draw_mix, mix

WHOLE = slice(None)
SIZE = (30, 44)


def pictures(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8))


def test_mixup_blends_an_image_and_its_partner() -> None:
    images, labels = pictures(6), torch.arange(6) * 10
    draws = draw_mix(np.random.default_rng(0), 6, SIZE, mixup=0.8, cutmix=0)
    mixed, (label, partner, weight) = mix(images, labels, draws, WHOLE)
    share = weight[:, None, None, None]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[draws.partner], atol=1e-3, rtol=0)
    assert torch.equal(label, labels) and torch.equal(partner, labels[draws.partner])


def test_cutmix_pastes_the_area_that_the_weight_says() -> None:
    # each image holds its own number only, so that each pixel tells where it comes from
    count = 50
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, *SIZE, 3)
    draws = draw_mix(np.random.default_rng(0), count, SIZE, mixup=0, cutmix=1)
    mixed, (_, partner, weight) = mix(images, torch.arange(count), draws, WHOLE)
    assert sorted(partner.tolist()) == list(range(count))
    for number in range(count):
        if partner[number] != number:
            own = (mixed[number, ..., 0] == number).float().mean()
            assert float(own) == pytest.approx(float(weight[number]), abs=1e-6)
            top, left, height, width = draws.boxes[:, number]
            box = mixed[number, top : top + height, left : left + width]
            assert torch.equal(box, torch.full_like(box, float(partner[number])))
            assert set(mixed[number].unique().tolist()) <= {number, int(partner[number])}


def test_an_empty_cutmix_box_leaves_the_image() -> None:
    images = pictures(2)
    draws = MixDraws(np.array([1, 0]), np.zeros((4, 2), np.int64), np.ones(2))
    mixed, _ = mix(images, torch.tensor([0, 1]), draws, WHOLE)
    assert torch.equal(mixed, images.float())


def test_weights_of_mixup_have_the_beta_distribution() -> None:
    draws = draw_mix(np.random.default_rng(0), 4000, SIZE, mixup=0.4, cutmix=0)
    assert kstest(draws.weight, beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert not draws.boxes.any()


def test_boxes_of_cutmix_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    theirs, image = CutMix(alpha=0.7, num_classes=2), torch.empty(1, 3, *SIZE)
    expected = [theirs.make_params([image])["lam_adjusted"] for _ in range(4000)]
    draws = draw_mix(np.random.default_rng(0), 4000, SIZE, mixup=0, cutmix=0.7)
    assert ks_2samp(draws.weight, expected).statistic < 0.045
    top, left, height, width = draws.boxes
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= SIZE[0]).all() and (left + width <= SIZE[1]).all()


def test_with_both_each_image_takes_one_of_them() -> None:
    draws = draw_mix(np.random.default_rng(0), 4000, SIZE, mixup=1, cutmix=1)
    area = draws.boxes[2] * draws.boxes[3] / (SIZE[0] * SIZE[1])
    is_cut = area > 0
    np.testing.assert_allclose(draws.weight[is_cut], 1 - area[is_cut])
    assert np.mean(is_cut) == pytest.approx(0.5, abs=0.03)
    assert len(np.unique(draws.weight[~is_cut])) > 1900


@pytest.mark.parametrize("strength", [1e-3, 1e3])
def test_extreme_strengths_give_weights_between_0_and_1(strength: float) -> None:
    draws = draw_mix(np.random.default_rng(0), 1000, SIZE, mixup=strength, cutmix=strength)
    assert ((draws.weight >= 0) & (draws.weight <= 1)).all()


def test_one_image_is_its_own_partner() -> None:
    images = pictures(1)
    draws = draw_mix(np.random.default_rng(0), 1, SIZE, mixup=1, cutmix=1)
    mixed, (label, partner, _) = mix(images, torch.tensor([3]), draws, WHOLE)
    torch.testing.assert_close(mixed, images.float())
    assert label.tolist() == partner.tolist() == [3]
