"""One verb of the command line a file: `add_arguments(parser)` and `run(args)`; the table of verbs is in hpseg.cli."""
