"""The execution providers of ONNX Runtime that sessions may run on.

A provider is one record here and a row of the registry. Most come as a package of their own, which
ONNX Runtime loads as a plug-in (https://onnxruntime.ai/docs/execution-providers/
plugin-ep-libraries). What a provider can't run falls back to the processor, operator by operator.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnxruntime

from mmcompress.errors import MissingProvider
from mmcompress.registry import PROVIDERS

CPU_PROVIDER = "cpu"
"""The provider that every ONNX Runtime has."""

CPU_NAME = "CPUExecutionProvider"
"""ONNX Runtime's name of it."""

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
"""Setting of a session: it keeps which provider runs which operator."""

ProviderOptions = dict[str, str]
"""Options of a provider, as ONNX Runtime takes them."""


def _make_no_options(threads: int) -> ProviderOptions:
    """Return no options: the provider has its own threads, or none."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider of ONNX Runtime."""

    name: str
    """ONNX Runtime's name of it."""
    plugin: str = ""
    """The module of a plug-in package; empty where ONNX Runtime itself has the provider."""
    device: Mapping[str, str] = field(default_factory=dict)
    """What a device of the plug-in must say of itself to be taken."""
    known_devices: str = ""
    """The devices that the plug-in takes, for a person; empty where its name tells them."""
    make_options: Callable[[int], ProviderOptions] = _make_no_options
    """Returns the options for a number of threads."""


def _make_openvino_options(threads: int) -> ProviderOptions:
    """Return the options of OpenVINO on a processor.

    Its plug-in refuses options of its own for threads and precision. It takes them as a
    configuration of the device. Without the hint it would round to 16 bits where the processor can.
    """
    device = {"INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": "f32"}
    return {"load_config": json.dumps({"CPU": device})}


PROCESSOR = Provider(name=CPU_NAME)
"""The processor, by ONNX Runtime itself."""

OPENVINO = Provider(
    name="OpenVINOExecutionProvider",
    plugin="onnxruntime_ep_openvino",
    device={"ov_device": "CPU"},
    known_devices="processors of Intel alone",
    make_options=_make_openvino_options,
)
"""Intel processors, by OpenVINO."""

CUDA = Provider(name="CUDAExecutionProvider")
"""GPUs of Nvidia. Its package takes the place of `onnxruntime`."""

TENSORRT_RTX = Provider(
    name="NvTensorRTRTXExecutionProvider",
    plugin="onnxruntime_ep_nv_tensorrt_rtx",
)
"""GPUs of Nvidia, by TensorRT for RTX."""

COREML = Provider(name="CoreMLExecutionProvider")
"""Apple's processors. ONNX Runtime has it on macOS."""

QNN = Provider(
    name="QNNExecutionProvider",
    plugin="onnxruntime_qnn",
)
"""Qualcomm's processors for neural networks."""

_registered_plugins: set[str] = set()
"""Plug-ins that this process has loaded: a second registration is an error of ONNX Runtime."""


def add_provider(
    options: onnxruntime.SessionOptions, name: str, *, threads: int
) -> list[Any] | None:
    """Have a session run on a provider, and on the processor what the provider can't run.

    Args:
        options: The options of the session, which are changed.
        name: The provider, by the name that a spec uses.
        threads: Threads of the session.

    Returns:
        What the session takes as `providers`; None for a plug-in, which stands in the options.

    Raises:
        MissingProvider: The provider is not installed, or it finds no device on this machine.
    """
    if name == CPU_PROVIDER:
        return [CPU_NAME]
    found = find_provider(name)
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    provider_options = found.provider.make_options(threads)
    if found.plugin_device is None:
        return [(found.provider.name, provider_options), CPU_NAME]
    options.add_provider_for_devices([found.plugin_device], provider_options)
    return None


@dataclass(frozen=True, kw_only=True)
class FoundProvider:
    """A provider that this machine has."""

    provider: Provider
    """Its record."""
    plugin_device: Any
    """The device of its plug-in; None where ONNX Runtime itself has the provider."""


def find_provider(name: str) -> FoundProvider:
    """Find a provider on this machine.

    Raises:
        MissingProvider: It is not installed, or it finds no device here.
    """
    provider: Provider = PROVIDERS.get(name)
    if provider.name != CPU_NAME and not hasattr(onnxruntime, "get_ep_devices"):
        raise MissingProvider(
            f"provider {name}: ONNX Runtime {onnxruntime.__version__} takes no plug-ins: "
            "pip install -U onnxruntime"
        )
    distribution = PROVIDERS.get_fact(name, "distribution") or name
    if provider.plugin:
        devices = _list_plugin_devices(provider, distribution)
        if not devices:
            hint = f"; it takes {provider.known_devices}" if provider.known_devices else ""
            raise MissingProvider(
                f"provider {name}: {distribution} finds no device for {provider.name} here{hint}"
            )
        return FoundProvider(provider=provider, plugin_device=devices[0])
    if provider.name not in onnxruntime.get_available_providers():
        raise MissingProvider(
            f"provider {name}: this ONNX Runtime has no {provider.name}; "
            f"{_describe_install(distribution)}"
        )
    return FoundProvider(provider=provider, plugin_device=None)


def _describe_install(distribution: str) -> str:
    """Say how a provider is installed that ONNX Runtime itself must bring."""
    if distribution == "onnxruntime":
        return "it has one on other systems"
    return (
        f"install {distribution} in place of onnxruntime: "
        f"pip uninstall onnxruntime && pip install {distribution}"
    )


def _list_plugin_devices(provider: Provider, distribution: str) -> list[Any]:
    """Load a plug-in, and list its devices that are wanted.

    Raises:
        MissingProvider: The plug-in is not installed, or ONNX Runtime can't load it.
    """
    if provider.plugin not in _registered_plugins:
        try:
            plugin = importlib.import_module(provider.plugin)
            onnxruntime.register_execution_provider_library(
                provider.name, plugin.get_library_path()
            )
        except ModuleNotFoundError as error:
            raise MissingProvider(
                f"{provider.name} needs {distribution}: pip install {distribution}"
            ) from error
        except Exception as error:  # onnxruntime raises types that it does not export
            raise MissingProvider(f"{distribution} can't be loaded: {error}") from error
        _registered_plugins.add(provider.plugin)
    devices = []
    for device in onnxruntime.get_ep_devices():
        known = dict(device.ep_metadata)
        is_wanted = all(known.get(key) == value for key, value in provider.device.items())
        if device.ep_name == provider.name and is_wanted:
            devices.append(device)
    return devices


def count_fallbacks(session: onnxruntime.InferenceSession) -> Counter[str]:
    """Count the operators of a session that fell back to the processor, by their type.

    The session must have been opened on another provider.
    """
    fallbacks: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        if subgraph.ep_name == CPU_NAME:
            fallbacks.update(node.op_type for node in subgraph.get_nodes())
    return fallbacks
