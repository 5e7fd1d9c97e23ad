"""What is freed goes back to the system."""

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20


def give_back_large_blocks() -> None:
    """Has malloc ask the system for each block of a mebibyte or more, and give it back when it is freed.

    glibc raises that bound by itself, up to 32 MiB, and takes what is below it from one heap. Activations of
    some megabytes leave holes there, more of them from layer to layer: calibrating 28 layers, 512 wide, on
    8,192 tokens came to 0.51 GiB where it now stays at 0.27. Another C library is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
