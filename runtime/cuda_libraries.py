"""Whether onnxruntime's CUDA provider finds the libraries that it is linked against, and which it lacks.

onnxruntime itself only logs that, and goes on with the CPU.
"""

import contextlib
import ctypes
import io
import re
from pathlib import Path
from typing import Any

from gemma_export.errors import DeviceError, GemmaExportError, MissingDependencyError

# Loaded by onnxruntime in this order: what the second has undefined, the first defines.
_SHARED, _CUDA = "libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"

_MISSING = re.compile(r"(?P<file>(?P<library>lib\w+)\.so[.\d]*): cannot open shared object file")

PACKAGES = {
    "libcublas": "nvidia-cublas",
    "libcublasLt": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcudnn": "nvidia-cudnn",
    "libcufft": "nvidia-cufft",
    "libcurand": "nvidia-curand",
    "libnvrtc": "nvidia-cuda-nvrtc",
    "libnvJitLink": "nvidia-nvjitlink",
}
"""The pip package of each of CUDA's libraries, without the suffix for a version of CUDA."""


def load_cuda_provider(ort: Any) -> None:
    """Loads the library of onnxruntime's CUDA provider, with all that it needs.

    Args:
        ort: The module `onnxruntime`.

    Raises:
        MissingDependencyError: It is a build without that provider, or a library is missing: the message
            names it, the hint the package that has it.
        DeviceError: What is missing is the driver's library, or one of another version is there.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingDependencyError(
            f"The onnxruntime {ort.__version__} that is installed has no CUDA provider.",
            "Replace it: `pip uninstall onnxruntime`, then `pip install 'gemma-export[cuda]'`.",
        )
    # It finds what pip has installed; what it then prints about the rest is told below.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    if not (folder / _CUDA).is_file():
        return  # Built into onnxruntime itself.
    try:
        ctypes.CDLL(str(folder / _SHARED), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / _CUDA))
    except OSError as error:
        raise missing_library(str(error), ort.__version__, ort.cuda_version) from error


def missing_library(reason: str, version: str, cuda: str) -> GemmaExportError:
    """What to say of a library that could not be loaded.

    Args:
        reason: The system's own words: `libcublasLt.so.13: cannot open shared object file: …`.
        version: onnxruntime's.
        cuda: The version of CUDA that onnxruntime was built with, as in 13.0.
    """
    found = _MISSING.search(reason)
    if found is None:
        return DeviceError(
            f"The CUDA provider of onnxruntime {version} cannot be loaded: {reason}.",
            f"It needs CUDA {cuda}, and a driver that has it.",
        )
    file, library = found["file"], found["library"]
    if library == "libcuda":
        return DeviceError(
            f"The CUDA provider of onnxruntime {version} needs {file}, which is not on this machine.",
            "It comes with the driver of an NVIDIA GPU: install the driver, or build the bundle with "
            "--target cpu.",
        )
    package = package_of(library, cuda)
    return MissingDependencyError(
        f"The CUDA provider of onnxruntime {version} needs {file}, which is not installed.",
        f"Install CUDA {cuda}'s with `pip install {package}`, or put its folder into LD_LIBRARY_PATH."
        if package is not None
        else f"Install CUDA {cuda}, or put the folder of {file} into LD_LIBRARY_PATH.",
    )


def package_of(library: str, cuda: str) -> str | None:
    """The pip package of one of CUDA's libraries, as `libcublas`; None of any other.

    NVIDIA's packages are named after the version of CUDA up to 12; since 13 only cuDNN's is.
    """
    package = PACKAGES.get(library)
    major = int(cuda.partition(".")[0])
    suffixed = major < 13 or library == "libcudnn"
    return f"{package}-cu{major}" if package is not None and suffixed else package
