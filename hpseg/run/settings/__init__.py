"""What a run can be told, each setting declared once: default, range, a sentence of help.

Validation, the command line, config.json and docs/settings.md are made from these declarations. Settings that methods
share are grouped by theme (shared.py), the others by method (methods.py); hpseg.run.config.Config is their sum.
"""
