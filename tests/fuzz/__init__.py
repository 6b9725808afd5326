"""Random tables, tars, settings and run directories: what a user sees of them, and which files are touched."""
