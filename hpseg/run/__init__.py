"""One training run as the user sees it: settings, presets, the run folder, files and errors."""
