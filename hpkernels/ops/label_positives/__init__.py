"""The positive terms of losses whose pairs are given by labels."""
