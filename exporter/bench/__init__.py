"""What a bundle costs to run, next to what the machine could do."""
