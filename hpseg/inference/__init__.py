"""From a trained run to label maps, overlays and contact sheets."""
