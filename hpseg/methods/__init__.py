"""One published method a file or folder: its trained parts, its loss and its schedule."""
