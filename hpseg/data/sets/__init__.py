"""One published data set a file: its folders, its classes, its splits."""
