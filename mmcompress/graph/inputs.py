"""The inputs of a pipeline: one takes what the data perceive, another the text beside it."""

from __future__ import annotations

from collections.abc import Mapping

REFERENCE_TYPE = "text"
"""The type of what stands beside every input of the data: its reference text."""


def find_data_input(inputs: Mapping[str, str]) -> str:
    """Return the input that takes the inputs of the data: the only one, or the one that is no text.

    Args:
        inputs: Value types of the pipeline's inputs, by name.
    """
    perceived = [name for name, value_type in inputs.items() if value_type != REFERENCE_TYPE]
    return (perceived or list(inputs))[0]


def find_text_input(inputs: Mapping[str, str]) -> str:
    """Return the input that takes the reference texts of the data; empty where none does.

    Args:
        inputs: Value types of the pipeline's inputs, by name.
    """
    data_input = find_data_input(inputs)
    others = [name for name in inputs if name != data_input]
    return others[0] if others else ""


def make_request(inputs: Mapping[str, str], value: object, *, text: str) -> dict[str, object]:
    """Make the request of one pair.

    Args:
        inputs: Value types of the pipeline's inputs, by name.
        value: The input of the pair.
        text: Its reference text. A pipeline with one input is not given it.

    Returns:
        Values by name of the pipeline's input.
    """
    request: dict[str, object] = {find_data_input(inputs): value}
    text_input = find_text_input(inputs)
    if text_input:
        request[text_input] = text
    return request
