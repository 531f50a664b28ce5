"""Identities to recognise, from the two photographs that ship with scikit-learn: every place in them is one, and every
look at it a little different, as in Exemplar-CNN (arXiv 1406.6909). For the examples beside it."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

SIZE, STRIDE, SHIFT = 16, 6, 2  # of an image; between two places; of a look, at most


class Photographs:
    """The places with the most contrast: the sky is one place many times over."""

    def __init__(self, identities: int):
        photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
        photographs = F.avg_pool2d(photographs, 2)  # (2, 3, 213, 320)
        self.places = photographs.unfold(2, SIZE + 2 * SHIFT, STRIDE).unfold(3, SIZE + 2 * SHIFT, STRIDE)
        contrast = self.places.std((1, 4, 5))  # (2, rows, columns)
        self.chosen = contrast.flatten().topk(identities).indices
        self.shape = contrast.shape

    def look(self, identity: Tensor, generator: torch.Generator) -> Tensor:
        """A new image of each, (N, 3, SIZE, SIZE): shifted, in another light, with noise."""
        photograph, row, column = torch.unravel_index(self.chosen[identity], self.shape)
        windows = self.places[photograph, :, row, column].unfold(2, SIZE, 1).unfold(3, SIZE, 1)
        down, right = torch.randint(2 * SHIFT + 1, (2, len(identity)), generator=generator)
        images = windows[torch.arange(len(identity)), :, down, right]
        light = torch.empty(2, len(identity), 1, 1, 1).uniform_(-0.2, 0.2, generator=generator)
        return (images - 0.5) * (1 + light[0]) + light[1] + 0.05 * torch.randn(images.shape, generator=generator)
