"""The options that say what is built, declared once, and the request that they become.

A group is a function: its parameters are options, and what it returns are fields of `BuildRequest`. A command
names the groups it takes and gets the request they make.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from gemma_export.exporter.commands import options
from gemma_export.exporter.engines.options import EngineOptions, read_memory, read_sms
from gemma_export.exporter.request import BuildRequest, CalibrationRequest

Fields = dict[str, Any]
Group = Callable[..., Fields]


def takes_request(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts the options of groups in the place of a command's first parameter, which is a `BuildRequest`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command).parameters.values()
        shared = [list(inspect.signature(group).parameters.values()) for group in groups]

        @wraps(command)
        def run(**given: Any) -> None:
            fields: Fields = {}
            for group, parameters in zip(groups, shared, strict=True):
                fields |= group(**{parameter.name: given.pop(parameter.name) for parameter in parameters})
            command(BuildRequest(**fields), **given)

        merged = [*(parameter for parameters in shared for parameter in parameters), *own]
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in merged]
        vars(run)["__signature__"] = inspect.Signature(named)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
        return run

    return decorate


def model(
    size: options.Size = None,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = False,
    seed: options.WeightsSeed = None,
    tokenizer: options.Tokenizer = None,
) -> Fields:
    """Which model."""
    return {
        "size": size,
        "checkpoint": checkpoint,
        "random_weights": random_weights,
        "seed": seed,
        "tokenizer": tokenizer,
    }


def any_precision(
    precision: options.Precision = "fp32",
    target: options.Target = "cpu",
    scheme: options.Scheme = None,
    block: options.Block = None,
) -> Fields:
    """How it computes, and where."""
    return {"precision": precision, "target": target, "scheme_name": scheme, "block": block}


def quantized_precision(
    precision: options.Quantized = "int8",
    target: options.Target = "cpu",
    scheme: options.Scheme = None,
    block: options.Block = None,
) -> Fields:
    """The same for what needs scales."""
    return {"precision": precision, "target": target, "scheme_name": scheme, "block": block}


def calibration(
    calibration_data: options.CalibrationData = None,
    calibration_samples: options.CalibrationSamples = None,
    calibration_length: options.CalibrationLength = None,
    calibration_seed: options.CalibrationSeed = None,
    observer: options.Observer = "mse",
) -> Fields:
    """What scales are made on."""
    request = CalibrationRequest(
        calibration_data, calibration_samples, calibration_length, calibration_seed, observer
    )
    return {"calibration": request}


def instead_of_calibration(
    scales: options.Scales = None, no_calibration: options.NoCalibration = False
) -> Fields:
    """Where scales come from without one."""
    return {"scales": scales, "no_calibration": no_calibration}


def cache(kv_cache: options.Cache = "float") -> Fields:
    """What keys and values are stored as."""
    return {"kv_cache": kv_cache}


def layers_kept(
    max_kl: options.MaxKl = None, max_perplexity_increase: options.MaxPerplexityIncrease = None
) -> Fields:
    """How much quantizing may cost."""
    return {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}


def graph(
    max_length: options.MaxLength = None,
    logits: options.Logits = "last",
    local_cache: options.LocalCache = "full",
) -> Fields:
    """What the graph takes and gives."""
    return {"max_length": max_length, "logits": logits, "local_cache": local_cache}


def gate(
    parity: options.Parity = "quick", allow_parity_failure: options.AllowParityFailure = False
) -> Fields:
    """What is measured, and what follows."""
    return {"parity": parity, "allow_parity_failure": allow_parity_failure}


def engine_options(
    sm: options.Sm = None,
    max_batch: options.MaxBatch = None,
    prefill_chunk: options.PrefillChunk = None,
    device: options.DeviceName = None,
    memory: options.Memory = None,
) -> Fields:
    """What engines must run, and where."""
    return {"engines": EngineOptions(read_sms(sm), max_batch, prefill_chunk, device, read_memory(memory))}


def output(output: options.OutputBundle = None, force: options.Force = False) -> Fields:
    """Where it goes."""
    return {"output": output, "force": force}
