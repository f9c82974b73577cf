"""One verb of the command line a file: `add_arguments(parser)` and `run(args)`. hpseg.cli.main has the table."""
