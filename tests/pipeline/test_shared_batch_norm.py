"""BatchNorm of several ranks. test_distributed.py compares what two ranks compute with one process."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from pipeline.training.frozen_backbone import unfreeze
from pipeline.training.shared_batch_norm import SharedBatchNorm, share_batch_statistics

NETWORKS = ["timm/test_efficientnet", "timm/test_maxvit", "torchvision/shufflenet_v2_x0_5"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_tensors_of_a_network_and_their_names_stay(name: str, device: str) -> None:
    """The optimiser and the moving average refer to them."""
    network = models.build(name, (3, 32, 32), 5)
    before = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    names = list(network.state_dict())
    shared = share_batch_statistics(network, 2, torch.device(device))
    kind = SharedBatchNorm if device == "cpu" else nn.SyncBatchNorm
    layers = [layer for layer in shared.modules() if isinstance(layer, _BatchNorm)]
    assert len(layers) > 5 and all(isinstance(layer, kind) for layer in layers)
    after = {**dict(shared.named_parameters()), **dict(shared.named_buffers())}
    assert list(shared.state_dict()) == names
    assert before.keys() == after.keys() and all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_statistics_stay_frozen_and_give_the_same_logits(name: str, device: str) -> None:
    """The activations inside timm's layers are kept."""
    torch.manual_seed(0)
    network = models.build(name, (3, 32, 32), 5)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        network.train()(images)  # statistics that are not those of a new network
    unfreeze(network, keep_statistics=True)
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    statistics = {key: value.clone() for key, value in network.named_buffers()}
    expected = network(images)
    shared = share_batch_statistics(network, 2, torch.device(device))
    torch.testing.assert_close(shared(images), expected)
    assert all(torch.equal(value, statistics[key]) for key, value in shared.named_buffers())
