"""A graph compiled for a device with TensorRT, on a machine that may have no GPU."""
