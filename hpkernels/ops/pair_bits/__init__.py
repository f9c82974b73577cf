"""Masks of pairs as bits: random ones, counts, transposes, pairs from lists."""
