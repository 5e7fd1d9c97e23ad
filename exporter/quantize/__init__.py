"""From a source and a scheme to the numbers that a quantized build needs: text, collecting, sensitivity."""
