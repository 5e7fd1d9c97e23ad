"""The canonical graph and what each target makes of it."""
