"""One file is one published method: its loss and its schedule."""
