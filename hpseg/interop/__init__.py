"""Runs in formats of other programs: torch.export, the released Hidden Positives checkpoints."""
