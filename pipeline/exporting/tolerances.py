"""Parity tolerances: how much an exported file may differ from PyTorch's outputs, by precision (fp32, fp16, int8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

TIE = 1e-5  # classes whose probabilities differ by no more than this count as equally probable
# where logits range over less than this, they may differ as if they ranged over this much: a difference of 2e-5 changes
# no probability by more than 1e-5
LEAST_RANGE = 1.0


@dataclass(frozen=True)
class Tolerance:
    """By how much a file of one precision may differ. NaN and infinity never pass.

    With `probability`, the largest |Δprobability|: all top-1 predictions must be equal, except ties. Each |Δlogit| is
    at most `logit` times the range of its image's logits, 0 included (or the median range, where that is larger).
    Rounding errors have either sign; errors from a wrong weight or bias do not. So the mean Δlogit of a class over n
    images is at most `logit` / √n times the median range, or `mean_logit` times it where that is larger.

    Without `probability`: precision @ 1 may lose `lost_share` of the images or `lost_images`, whichever is more. A file
    can keep its precision and favour a class, so the numbers of predictions of the classes may shift by at most twice
    as many images in all (half the sum of their absolute differences). Where images have no labels, four times as many
    may have another top-1 prediction (int8 changes 1.6% of those of cifar10).
    """

    probability: float | None = None
    logit: float | None = None
    mean_logit: float = 0.0
    lost_share: float = 0.0
    lost_images: int = 0

    def allowed_losses(self, count: int) -> float:
        """How many of `count` images may be classified wrongly that the reference classifies correctly."""
        return max(self.lost_share * count, self.lost_images)


TOLERANCES: dict[Precision, Tolerance] = {
    # largest |Δlogit| seen between PyTorch and onnxruntime, as a share of the range (in parentheses: the mean over a
    # class): 5e-7 (1e-8) for digits, 7e-7 (7e-8) for cifar10; after a few steps on noise 4e-6 (1e-7) for deep-mnist,
    # 2e-6 (1e-7) for resnet50, 3e-7 (2e-7) for efficientnet_b0, 8e-7 for convnext_tiny, 4e-7 for vit_b_16; less for the
    # others. A bias that is wrong by 0.01 where logits range over 1,400 is 7e-6.
    "fp32": Tolerance(probability=1e-5, logit=2e-5, mean_logit=1e-6),
    "fp16": Tolerance(lost_share=0.001, lost_images=1),
    "int8": Tolerance(lost_share=0.005, lost_images=2),
}
