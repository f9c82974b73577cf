"""One public loss a file, each a plain composition of the ops."""
