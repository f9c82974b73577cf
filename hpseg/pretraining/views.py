"""What `hpseg distill` looks at: crops of photographs. Those of a step are a function of the seed and of its number."""

import numpy as np
import torch

from hpseg.pretraining.crops import Album, random_crop

LONGEST = 768  # pixels a side, to which photographs are brought before crops are cut
AREA = (0.06, 1.0)  # of the photograph, that a crop shows


class Views(torch.utils.data.IterableDataset):
    """Endless batches of uint8 crops (B, 3, s, s), from that of step `start`, an attribute.

    sides: of the crops, drawn anew at each step; batches have as many pixels as `batch_size` crops of the first side.
    """

    def __init__(self, photos, sides, batch_size, seed):
        self.photos, self.sides, self.batch_size = Album(photos, LONGEST), sides, batch_size
        self.seed, self.start = seed, 0

    def batch(self, step):
        rng = np.random.default_rng([self.seed, step])
        side = self.sides[rng.integers(len(self.sides))]
        count = max(1, round(self.batch_size * (self.sides[0] / side) ** 2))
        chosen = rng.permutation(len(self.photos))[:count]
        if len(chosen) < count:
            chosen = rng.integers(len(self.photos), size=count)
        return torch.stack([random_crop(rng, self.photos[number], side, *AREA) for number in chosen])

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self.start + number
        while True:
            yield self.batch(step)
            step += workers


def mixed(pixels, generator, share):
    """With probability `share` a picture gets a box of the next one in the batch (CutMix): (B, 3, H, W)."""
    batch, _, height, width = pixels.shape

    def draw(count=batch):
        return torch.rand(count, generator=generator)

    area, aspect = 0.1 + 0.4 * draw(), torch.exp(1.4 * draw() - 0.7)
    sides = [(area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)]
    inside = torch.ones(batch, 1, 1, dtype=torch.bool)
    for extent, side, axis in ((height, sides[0], 1), (width, sides[1], 2)):
        first = draw() * (1 - side)
        place = (torch.arange(extent) + 0.5) / extent
        within = (place >= first[:, None]) & (place < (first + side)[:, None])
        inside = inside & within.unsqueeze(3 - axis)
    inside = (inside & (draw() < share).view(-1, 1, 1)).unsqueeze(1).to(pixels.device)
    return torch.where(inside, pixels.roll(1, 0), pixels)
