"""Holding a bundle against its reference: what is run, how far apart they are, and the page that shows it."""
