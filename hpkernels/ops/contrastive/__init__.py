"""Statistics of a masked contrastive loss, and their gradient."""
