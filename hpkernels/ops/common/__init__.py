"""What the files of one backend share across ops."""
