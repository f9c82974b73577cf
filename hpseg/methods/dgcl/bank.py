"""A memory of features by class, as DGCL has it: what was seen last of each class, with the density it had then."""

from __future__ import annotations

import torch
from torch import Tensor

import hpkernels

SCALES = (8, 16, 32)  # neighbours of the multi-scale density


class Bank:
    """Per class the last `rows` features, projections and densities (as they were at insertion), oldest overwritten."""

    def __init__(self, classes: int, rows: int, dim: int):
        self.rows = rows
        self.features, self.projections = torch.zeros(classes, rows, dim), torch.zeros(classes, rows, dim)
        self.density = torch.zeros(classes, rows)
        self.inserted = torch.zeros(classes, dtype=torch.int64)  # so far; a ring: row inserted % rows comes next

    def to(self, device: torch.device) -> None:
        self.features, self.projections, self.density = (
            x.to(device) for x in (self.features, self.projections, self.density)
        )

    def count(self, label: int) -> int:
        return min(int(self.inserted[label]), self.rows)

    @property
    def full(self) -> bool:
        return bool((self.inserted >= self.rows).all())

    def densities(self, features: Tensor, labels: Tensor, least: int) -> Tensor:
        """Density (N,) of features (N, D) among the rows of their own class; 0 for classes of at most `least` rows."""
        held = [c for c in labels.unique().tolist() if self.count(c) > least]
        density = features.new_zeros(len(features), dtype=torch.float32)
        if held:
            mine = torch.isin(labels, labels.new_tensor(held))
            memory = torch.cat([self.features[c, : self.count(c)] for c in held])
            groups = torch.cat([labels.new_full((self.count(c),), c) for c in held])
            density[mine] = hpkernels.neighbor_density(
                features[mine], memory, scales=SCALES, query_groups=labels[mine], memory_groups=groups
            )
        return density

    def densest(self, label: int, most: int) -> Tensor:
        """Projections (at most `most`, D) of the rows of a class that were densest at insertion."""
        best = self.density[label, : self.count(label)].topk(min(most, self.count(label))).indices
        return self.projections[label, best]

    def insert(self, label: int, features: Tensor, projections: Tensor, density: Tensor) -> None:
        start, count = int(self.inserted[label]), min(len(features), self.rows)
        rows = (torch.arange(start, start + count) % self.rows).to(self.features.device)
        self.features[label, rows] = features[:count].float()
        self.projections[label, rows] = projections[:count].float()
        self.density[label, rows] = density[:count]
        self.inserted[label] += count

    def state(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
