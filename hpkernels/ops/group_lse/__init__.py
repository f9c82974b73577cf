"""The log-sum-exp over the rows of other groups."""
