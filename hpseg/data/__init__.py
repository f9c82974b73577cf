"""Photographs in: decoding, views, and the order in which training sees them."""
