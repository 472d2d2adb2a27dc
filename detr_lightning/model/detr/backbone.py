"""The convolutional body: torchvision's ResNet up to its last feature map, with frozen norms."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class Backbone(nn.Module):
    """A ResNet without its pooling and classifier.

    Args:
        block: `basic` (ResNet-18, -34) or `bottleneck` (ResNet-50 and deeper).
        blocks: The number of blocks in each of the four stages.
        dilation: Dilate the last stage instead of striding it, which doubles the resolution of the feature map (DC5).
    """

    def __init__(self, block: str, blocks: tuple[int, ...], dilation: bool = False) -> None:
        super().__init__()
        resnet = ResNet(
            BLOCKS[block],
            list(blocks),
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        # All layers except the average pooling and the classifier.
        self.body = nn.Sequential(OrderedDict(islice(resnet.named_children(), 8)))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the last stage, `[B, C, H, W]`, for images `[B, 3, h, w]`."""
        features: Tensor = self.body(images)
        return features
