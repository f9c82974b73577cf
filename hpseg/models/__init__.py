"""Networks: the frozen backbone, its weights, other extractors, the trained heads."""
