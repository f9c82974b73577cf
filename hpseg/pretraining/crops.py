"""What `hpseg pretrain` looks at: crops, changes of colour, masks, and hand-made statistics of texture."""

import logging
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hpseg.data.procedural import random_image
from hpseg.data.transforms import UnreadableImage, load_image
from hpseg.run.errors import UsageError
from hpseg.runtime.messages import progress

logger = logging.getLogger(__name__)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, the custom of timm's ViTs
HELD_BYTES = 1 << 30  # of photographs in memory
BYTES_A_PIXEL = 4  # as Pillow holds RGB
STATISTICS = 42  # of texture and colour, per patch


class Album:
    """Photographs at no more than `longest` pixels a side. As many of the first as HELD_BYTES take are held in memory;
    the others are read again each time, so that any number of photographs can be learned from.

    Says which of `paths` cannot be decoded and leaves them out; UsageError where that is all and one is `required`.
    """

    def __init__(self, paths, longest, required=True):
        self.longest, self.paths, self.held, free = longest, [], [], HELD_BYTES
        for path in progress(paths, "read", len(paths), "photograph"):
            try:
                image = self._read(path)
            except UnreadableImage as error:
                logger.warning(f"skipped {error}")
                continue
            free -= BYTES_A_PIXEL * image.width * image.height
            if free >= 0:  # once it is not, it never is again
                self.held.append(image)
            self.paths.append(path)
        if required and not self.paths:
            raise UsageError(f"photos: none of the {len(paths)} pictures can be decoded, for example {paths[0]}")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        """UsageError for a file that could be read before and cannot be any more."""
        if number < len(self.held):
            return self.held[number]
        try:
            return self._read(self.paths[number])
        except UnreadableImage as error:
            raise UsageError(f"photos: a picture cannot be read any more ({error}); put it back and --resume") from None

    def _read(self, path):
        image = load_image(path)
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        return image


def random_crop(rng, image, side, low, high, turn=False):
    """A random box of `low` to `high` of the image's area, aspect 3/4 to 4/3, resized to (3, side, side).

    Flipped half the time; with `turn` also turned by a random multiple of 90 degrees.
    """
    width, height = image.size
    area, aspect = rng.uniform(low, high) * width * height, np.exp(rng.uniform(-0.29, 0.29))
    w, h = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    crop = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + w, top + h)))
    crop = np.rot90(crop, rng.integers(4) if turn else 0)
    crop = crop[:, ::-1] if rng.uniform() < 0.5 else crop
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))


class Crops(torch.utils.data.IterableDataset):
    """Endless batches of uint8 crops: large (2, B, 3, s, s) and small (n, B, 3, s/2, s/2).

    longest: pixels a side of the photographs, see Album. A pool of procedural images is kept and partly redrawn at
    every step, which costs less than drawing every image anew.
    """

    def __init__(self, photos, options, start, longest=560, redraw=1):
        self.options, self.start, self.redraw = options, start, redraw
        self.photos = Album(photos, longest, required=options.procedural < 1)
        self.pool = 20 * options.batch_size if options.procedural > 0 else 0

    def __iter__(self):
        options, rng = self.options, np.random.default_rng([self.options.seed, self.start])
        drawn = [Image.fromarray(random_image(rng)) for _ in range(self.pool)]
        while True:
            for _ in range(self.redraw if drawn else 0):
                drawn[rng.integers(len(drawn))] = Image.fromarray(random_image(rng))
            large, small = [[], []], [[] for _ in range(options.small_crops)]
            for _ in range(options.batch_size):
                is_drawn = rng.uniform() < options.procedural
                source = drawn if is_drawn else self.photos
                image = source[rng.integers(len(source))]
                big, little = ((0.25, 0.8), (0.06, 0.25)) if is_drawn else ((0.08, 0.7), (0.02, 0.15))
                for crops in large:
                    crops.append(random_crop(rng, image, options.crop, *big, is_drawn))
                for crops in small:
                    crops.append(random_crop(rng, image, options.crop // 2, *little, is_drawn))
            yield [
                torch.stack([torch.stack(view) for view in crops]) if crops else torch.zeros(0)
                for crops in (large, small)
            ]


class _Told(torch.utils.data.IterableDataset):
    """Batches of a dataset, and at last the UsageError that ends them: raised in a loading process, it would come with
    a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        try:
            yield from self.dataset
        except UsageError as error:
            yield error


def made_ahead(dataset):
    """Batches of an IterableDataset, which another process makes a few ahead. UsageError as the dataset raises it."""
    for batch in torch.utils.data.DataLoader(_Told(dataset), batch_size=None, num_workers=1, prefetch_factor=4):
        if isinstance(batch, UsageError):
            raise batch
        yield batch


def change_colours(x, generator):
    """Random brightness, contrast, saturation and hue, at times no colour: x (B, 3, H, W) in [0, 1] -> normalised."""

    def draw(low, high):
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)

    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    angle, axis = draw(-0.1, 0.1) * 2 * math.pi, 1 / math.sqrt(3)  # hue: turn the chroma about the grey axis
    chroma = x - grey
    turned = torch.cos(angle) * chroma + torch.sin(angle) * axis * (chroma.roll(1, 1) - chroma.roll(2, 1))
    x = grey + turned * draw(0.4, 1.5) * (draw(0, 1) > 0.1)
    x = (x - x.mean((2, 3), keepdim=True)) * draw(0.6, 1.4) + x.mean((2, 3), keepdim=True) * draw(0.7, 1.3)
    return (x.clamp(0, 1) - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def texture_statistics(x, patch, orientations=8):
    """Hand-made texture and colour statistics of every patch: (B, 3, H, W) -> (B, T, 42).

    Gradient magnitudes at two scales are shared out between the two nearest of 8 orientations, averaged over the patch
    and divided by the energy of the 3 x 3 patches around. Kept are these (16), the magnitudes of their Fourier series
    over the orientations, which a rotation leaves alone, averaged over 3 x 3 (10) and about 5 x 5 patches (10), and the
    mean and spread of brightness and two colour differences (6).
    """

    def blur(t):
        return F.avg_pool2d(F.pad(t, [1] * 4, mode="replicate"), 3, 1)

    oriented = []
    for scale in (1, 3):
        grey = F.avg_pool2d(F.pad(x.mean(1, keepdim=True), [scale // 2] * 4, mode="replicate"), scale, 1)
        dy = F.pad(grey[:, :, 2 * scale :] - grey[:, :, : -2 * scale], (0, 0, scale, scale))
        dx = F.pad(grey[..., 2 * scale :] - grey[..., : -2 * scale], (scale, scale, 0, 0))
        place = torch.atan2(dy, dx) / math.pi * orientations
        apart = (place - torch.arange(orientations, device=x.device).view(1, -1, 1, 1)).remainder(orientations)
        share = (1 - torch.minimum(apart, orientations - apart)).clamp(min=0)
        energy = F.avg_pool2d(share * torch.hypot(dy, dx), patch)
        oriented.append(energy / (blur(energy.mean(1, keepdim=True)) + 0.05))
    turned = blur(torch.cat([torch.fft.rfft(e, dim=1).abs() for e in oriented], 1))
    red, green, blue = x.split(1, 1)
    opponent = torch.cat([x.mean(1, keepdim=True), red - blue, (red + blue) / 2 - green], 1)
    mean = F.avg_pool2d(opponent, patch)
    spread = (F.avg_pool2d(opponent.square(), patch) - mean.square()).clamp(min=0).sqrt()
    return torch.cat([*oriented, turned, blur(turned), blur(mean), blur(spread)], 1).flatten(2).transpose(1, 2)


def random_masks(batch, side, generator, low=0.1, high=0.5):
    """Blocks of patches to hide: bool (batch, side * side), each row `low` to `high` covered."""
    noise = torch.rand(batch, 1, side // 2, side // 2, generator=generator)
    noise = F.interpolate(noise, size=(side, side), mode="bilinear").flatten(1)
    covered = low + (high - low) * torch.rand(batch, 1, generator=generator)
    rank = noise.argsort(1).argsort(1)
    return rank < covered * side * side
