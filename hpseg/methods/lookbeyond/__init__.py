"""Looking Beyond Single Images (NeurIPS 2021): contrast across images by auxiliary labels."""
