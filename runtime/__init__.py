"""Running a bundle: thin, without torch, and without anything of the exporter."""
