"""`hpseg pretrain`: a small ViT from your own photographs."""
