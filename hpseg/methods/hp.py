"""Hidden Positives: "Leveraging Hidden Positives for Unsupervised Semantic Segmentation" (CVPR 2023).

Positives of a patch are the patches of the batch that resemble it more than anything in a reference pool does, once by
frozen features (task-agnostic) and once by the momentum head's codes (task-specific, with weight lambda). The loss
pulls codes of positives together, for the codes themselves and for codes mixed over their attended 3 x 3 neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import hpkernels
from hpseg.features.pools import draw_tokens
from hpseg.methods.base import Method, Source, lambda_at
from hpseg.models.backbone import Tokens
from hpseg.models.heads import ClusterProbe, Projection, SegmentationHead, channel_dropout, compared
from hpseg.run.config import Config
from hpseg.runtime.distributed import Share
from hpseg.runtime.profile import stage


class HiddenPositives(Method):
    """The four trained parts (head, momentum head, projection, cluster probe), the pools and the loss of one step."""

    TERMS = ("contrastive", "cluster", "consistency")

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.config = config
        self.head = SegmentationHead(channels, config.dim, config.dtype)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.projection = Projection(config.dim, config.dtype)
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

    def _pool(self, renewal: int, mined: Callable[[Tensor, Share], Tensor], source: Source) -> Tensor:
        def encode(batches: list[list[int]]) -> Iterator[tuple[Tensor, Share]]:
            # Pools see their images as of negative epochs: other random crops than those of training.
            for features, share in source.features(batches, -1 - renewal):
                yield mined(features, share), share

        config = self.config
        return draw_tokens(
            source.images, config.pool_size, config.pool_images, encode, source.batch_size, source.pool_rng
        )

    def extra_state(self) -> dict[str, Tensor]:
        return {"features_pool": self.pools[0], "codes_pool": self.pools[1]}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        device = self.projection.weight.device
        self.pools = [state["features_pool"].to(device), state["codes_pool"].to(device)]

    def mining_features(self, features: Tensor, share: Share) -> Tensor:
        """Frozen features as the miner sees them."""
        return channel_dropout(features, self.config.mining_dropout, share)

    @torch.no_grad()
    def mining_codes(self, features: Tensor, share: Share) -> Tensor:
        """Codes of the momentum head as the miner sees them."""
        codes = self.momentum_head(features, self.config.dropout, share)
        return channel_dropout(codes, self.config.mining_dropout, share)

    def follow(self) -> None:
        # The published order: the average moves with the parameters of this forward pass, before the optimizer does.
        self.momentum_head.follow(self.head, self.config.ema_momentum)

    def losses(
        self,
        view: Tokens,
        jittered: Tokens | None,
        step: int,
        seed: int,
        share: Share,
    ) -> dict[str, Tensor]:
        """Loss terms of one batch, to be summed.

        view: frozen features (b, T, C) and neighbour weights (b, T, 9) of this rank's share of the batch; jittered:
        tokens of the same crops after photometric jitter, or None; seed: of the random negatives.
        """
        config = self.config
        codes = self.head(view.features, config.dropout, share)
        mining_codes = self.mining_codes(view.features, share)
        projected = self.projection(codes)
        projected_local = None
        if config.local:
            # Weights come with the published factor and are proportional to it; it does not decide which of them count.
            weights = view.neighbors * (config.local_scale / 28)
            local_codes = hpkernels.neighbor_mix(codes, weights, view.grid)
            projected_local = self.projection(channel_dropout(local_codes, config.mining_dropout, share))
        handed = partial(compared, dtype=config.loss_dtype)
        features_pool, codes_pool = (handed(pool[share.ranks.rows(len(pool))]) for pool in self.pools)
        weight = lambda_at(step, config)
        # With weight 0 the task-specific search decides nothing and is left out.
        specific = (
            dict(head_features=handed(mining_codes.flatten(0, 1)), head_pool=codes_pool, head_weight=weight)
            if weight
            else {}
        )
        with stage("loss"):
            contrastive = hpkernels.hidden_positive_loss(
                handed(projected),
                handed(self.mining_features(view.features, share).flatten(0, 1)),
                features_pool,
                z_local=None if projected_local is None else handed(projected_local),
                temperature=config.temperature,
                negative_rate=config.negative_rate,
                weighting=config.weighting,
                head_in_denominator=config.head_in_denominator,
                seed=seed,
                process_group=share.ranks.group,
                **specific,
            )
            terms = {"contrastive": contrastive, "cluster": share.average(self.clusters.loss(codes))}
        if jittered is not None:
            projected_jittered = self.projection(self.head(jittered.features, config.dropout, share))
            distance = F.pairwise_distance(F.normalize(projected, dim=-1), F.normalize(projected_jittered, dim=-1))
            terms["consistency"] = config.consistency_weight * share.average(distance.mean())
        return terms
