"""What a person is told of an output: which loaders open it, and how much of it stays plain."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_merge.errors import UnsupportedError, listed
from lora_merge.formats import CodedFormat, Format, StoredWeight
from lora_merge.models.families import model_type
from lora_merge.models.skeleton import Skeleton
from lora_merge.planning.base_formats import Method
from lora_merge.planning.loaders import unfilled, unopened_experts
from lora_merge.spec import TensorSpec


def on_loaders(
    method: Method,
    format: CodedFormat,
    model: Skeleton | None,
    written: Mapping[str, TensorSpec],
    config: Mapping[str, object],
) -> list[str]:
    """Notes on loaders that do not open the output. written: weights that become codes, by module, stored names.

    Raises UnsupportedError where no loader would.
    """
    loader, notes = method.loader, []
    if missing := unfilled(loader, model, format.describe(next(iter(written.values()))), written):
        notes.append(_unopened(method, missing))
    if stacks := unopened_experts(loader, model, written):
        notes.append(
            f"transformers has the experts of a layer in one ({listed(stacks, 2)}) and opens no {method.name} of each "
            "alone, as servers do (vLLM, SGLang); for transformers keep them plain, with --keep experts"
        )
    if loader is not None and loader.text and model is not None and model.main_input != "input_ids":
        notes.append(f"transformers' loader of {method.name} opens models of text alone, and not {model.class_name}")
    if loader is not None and model_type(config) in loader.scaled_activations:
        notes.append(
            f"transformers' loader of {method.name} wants scales of the activations of {model_type(config)} models, "
            "which only calibration gives: it does not open this output, and vLLM does. Choose another --format for "
            "transformers"
        )
    if caveat := format.caveat(written):
        notes.append(caveat)
    return notes


def caveats_of(kept: Mapping[str, StoredWeight]) -> tuple[str, ...]:
    """What is to be said of weights, by name, that keep the format in which they are stored."""
    kinds: dict[type[Format], dict[str, StoredWeight]] = {}
    for name, stored in kept.items():
        kinds.setdefault(type(stored.format), {})[name] = stored
    found = []
    for weights in kinds.values():
        format = next(iter(weights.values())).format
        specs = {name.removesuffix(format.weight_suffix): stored.weight for name, stored in weights.items()}
        found.append(format.caveat(specs))
    return tuple(dict.fromkeys(caveat for caveat in found if caveat))


def _unopened(method: Method, missing: Collection[str]) -> str:
    """What to say of an output that transformers cannot open. UnsupportedError where nothing else could either."""
    message = (
        f"transformers' loader of {method.name} cannot open this output: it does not fill {listed(missing, 2)}, "
        "which the class makes of weights that are stored otherwise. Choose another --format"
    )
    if method.loader is not None and method.loader.served:
        return f"{message} for transformers"
    raise UnsupportedError(message)
