"""Weights of the 3 x 3 neighbours from attention, and mixing by them."""
