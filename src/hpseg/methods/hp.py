"""Hidden Positives: "Leveraging Hidden Positives for Unsupervised Semantic Segmentation" (CVPR 2023).

Positives of a patch are the patches of the batch that resemble it more than anything in a reference pool does, once by
frozen features (task-agnostic) and once by the momentum head's codes (task-specific, with weight lambda). The loss
pulls codes of positives together, for the codes themselves and for codes mixed over their attended 3 x 3 neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpkernels
from hpseg.backbones import Tokens
from hpseg.config import Config
from hpseg.heads import ClusterProbe, SegmentationHead, channel_dropout
from hpseg.methods import Source
from hpseg.pools import draw_tokens


def lambda_at(step: int, config: Config) -> float:
    """Weight of task-specific positives: 0 up to the warm-up, then linear, reaching 1 at the end of the run."""
    if step <= config.lambda_warmup:
        return 0.0
    return (step - config.lambda_warmup) / (config.steps - config.lambda_warmup)


class HiddenPositives(nn.Module):
    """The four trained parts (head, momentum head, projection, cluster probe), the pools and the loss of one step."""

    TERMS = ("contrastive", "cluster", "consistency")

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.head = SegmentationHead(channels, config.dim)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.projection = nn.Linear(config.dim, config.dim)
        self.clusters = ClusterProbe(config.dim, config.classes)
        self.pools: list[Tensor] = []  # (M, C) features and (M, D) codes

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        return {
            "head": torch.optim.AdamW(self.head.parameters(), lr=config.lr, weight_decay=config.weight_decay),
            "projection": torch.optim.Adam(self.projection.parameters(), lr=config.projection_lr),
            "clusters": torch.optim.Adam(self.clusters.parameters(), lr=config.cluster_lr),
        }

    def start(self, source: Source) -> None:
        self.pools = [self._pool(0, self.mining_features, source), self._pool(0, self.mining_codes, source)]

    def renew(self, step: int, source: Source) -> None:
        # Counted over the run, not within an epoch as published: a small folder's epochs are shorter than the interval.
        if step % self.config.renew_interval == 0:
            self.pools[1] = self._pool(step, self.mining_codes, source)

    def _pool(self, renewal: int, mined: Callable[[Tensor, torch.Generator], Tensor], source: Source) -> Tensor:
        # Pools see their images as of negative epochs: other random crops than those of training.
        return draw_tokens(
            source.images,
            self.config.pool_size,
            self.config.pool_images,
            lambda batches: (mined(f, source.dropout_rng) for f in source.features(batches, -1 - renewal)),
            source.batch_size,
            source.pool_rng,
        )

    def keys(self, batch: list[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
        return batch

    def extra_state(self) -> dict[str, Tensor]:
        return {"features_pool": self.pools[0], "codes_pool": self.pools[1]}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        device = self.projection.weight.device
        self.pools = [state["features_pool"].to(device), state["codes_pool"].to(device)]

    def mining_features(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Frozen features as the miner sees them."""
        return channel_dropout(features, self.config.mining_dropout, generator)

    @torch.no_grad()
    def mining_codes(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of the momentum head as the miner sees them."""
        codes = self.momentum_head(features, self.config.dropout, generator)
        return channel_dropout(codes, self.config.mining_dropout, generator)

    def losses(
        self,
        view: Tokens,
        jittered: Tensor | None,
        step: int,
        seed: int,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Loss terms of one step, to be summed; moves the momentum head on the way.

        view: frozen features (B, T, C) and neighbour weights (B, T, 9) of the batch; jittered: features of the same
        crops after photometric jitter, or None; seed: of the random negatives.
        """
        config = self.config
        codes = self.head(view.features, config.dropout, generator)
        mining_codes = self.mining_codes(view.features, generator)
        local_codes = hpkernels.neighbor_mix(codes, view.neighbors, view.grid)
        # The published order: the average moves with the parameters of this forward pass, before the optimizer does.
        self.momentum_head.follow(self.head, config.ema_momentum)

        projected = self.projection(codes)
        projected_local = self.projection(channel_dropout(local_codes, config.mining_dropout, generator))
        weight = lambda_at(step, config)
        # With weight 0 the task-specific search decides nothing and is left out.
        specific = (
            dict(head_features=mining_codes.flatten(0, 1), head_pool=self.pools[1], head_weight=weight) if weight else {}
        )
        contrastive = hpkernels.hidden_positive_loss(
            projected,
            self.mining_features(view.features, generator).flatten(0, 1),
            self.pools[0],
            z_local=projected_local,
            temperature=config.temperature,
            negative_rate=config.negative_rate,
            weighting=config.weighting,
            seed=seed,
            **specific,
        )
        terms = {"contrastive": contrastive, "cluster": self.clusters.loss(codes)}
        if jittered is not None:
            projected_jittered = self.projection(self.head(jittered, config.dropout, generator))
            distance = F.pairwise_distance(F.normalize(projected, dim=-1), F.normalize(projected_jittered, dim=-1))
            terms["consistency"] = config.consistency_weight * distance.mean()
        return terms
