"""What a smaller number format costs: text to measure on, and the range every tensor needs."""
