"""What gptqmodel makes of GPTQ that we wrote, and transformers with it and optimum."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import opened
import opened_by_gptqmodel
import pytest
import stored_parts as sp
import torch
from optional import present
from safetensors.torch import save_file

import lora_merge
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.gptq.method import GPTQMethod
from lora_merge.spec import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def gptqmodel() -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool does not start on two cores otherwise
    return pytest.importorskip("gptqmodel")


def written(format: GPTQ, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Parts as tensors, and the values that they decode to."""
    weight = TensorSpec(format.scale, tuple(rows.shape))
    data = sp.encoded(format, weight, rows)
    dtypes = {name: dtype for dtype, name in sp.DTYPES.items()}
    parts = {
        part: data[part].clone().view(dtypes[spec.dtype]).view(spec.shape)
        for part, spec in format.describe(weight).items()
    }
    return parts, sp.decoded(format, data, weight)


def read_back(parts: dict[str, torch.Tensor], format: GPTQ) -> torch.Tensor:
    """The weight as gptqmodel's own linear decodes it, scales in float32."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    rows, columns = parts["qweight"].shape[1], len(parts["g_idx"])
    group = columns if format.group_size == -1 else format.group_size
    linear = TorchLinear(format.bits, group, format.sym, format.order is not None, columns, rows)
    for part, tensor in parts.items():
        setattr(linear, part, tensor.clone())
    linear.scales = linear.scales.float()
    if format.version == 1:
        convert_gptq_v1_to_v2_format_module(linear, format.bits, torch.int32)
    linear.post_init()
    weight: torch.Tensor = linear.dequantize_weight()
    return weight.T


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_decodes_to_the_same_bits(gptqmodel: Any, bits: int, sym: bool, version: int) -> None:
    rows = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    shuffled = np.random.default_rng(0).permutation(np.arange(96) // 32).astype(np.int32).tobytes()
    for format in (
        GPTQ(bits, 32, sym, version),
        GPTQ(bits, -1, sym, version),
        GPTQ(bits, 32, sym, version, order=shuffled),
    ):
        parts, values = written(format, rows)
        assert torch.equal(read_back(parts, format), values), format


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_gptqmodel_wraps_round_are_read_as_it_does(gptqmodel: Any, bits: int) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows = torch.rand(64, 96, generator=torch.Generator().manual_seed(bits))
    rows[::3] -= 0.5
    format = GPTQ(bits, 32, sym=False, version=2)
    parts, values = written(format, rows)
    _, grid = format.unpack(sp.raw(parts), 64, 96)
    assert (present(grid.zero) == 0).any()
    linear = TorchLinear(bits, 32, False, False, 96, 64)
    linear.qzeros = parts["qzeros"].clone()
    linear.qzero_format(format=2)
    convert_gptq_v2_to_v1_format_module(linear, QuantizeConfig(bits=bits, group_size=32))
    parts["qzeros"] = linear.qzeros
    config = {"quantization_config": {"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}}}
    lowered = present(GPTQ.detect(sp.specs(parts), config, "x", lambda part: b""))
    weight, data = lowered.measure(sp.specs(parts)), sp.raw(parts)
    assert torch.equal(sp.decoded(lowered, data, weight), values)
    assert sp.same(sp.kept(lowered, weight, data, values), data)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fresh_scales_are_those_of_gptqmodel(gptqmodel: Any, bits: int, sym: bool) -> None:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer

    rows = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    rows[3] = 0
    grid = GPTQ(bits, 32, sym, version=2).fit(rows)
    quantizer = Quantizer(QuantizeConfig(bits=bits, group_size=32, sym=sym))
    quantizer.configure(perchannel=True)
    for group in range(3):
        quantizer.find_params(rows[:, group * 32 : group * 32 + 32], weight=True)
        assert torch.equal(grid.scale[:, group], quantizer.scale.flatten().half().float())
        assert torch.equal(present(grid.zero)[:, group], quantizer.zero.flatten())


FORMATS = [
    GPTQ(2, 32), GPTQ(3, 64), GPTQ(4, 32), GPTQ(8, 64), GPTQ(4, -1), GPTQ(4, 32, sym=False), GPTQ(4, 32, version=2),
    GPTQ(4, 32, scale="BF16"),
]  # fmt: skip


@pytest.mark.parametrize("plain", [(), ("down_proj",)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_transformers_opens_it(gptqmodel: Any, tmp_path: Path, format: GPTQ, plain: tuple[str, ...]) -> None:
    pytest.importorskip("optimum")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    expected = transformers.LlamaForCausalLM(config).float()
    weights, stored, formats = dict(expected.state_dict()), {}, {}
    kept = ["lm_head"] + [
        name.removesuffix(".weight") for name in weights if plain and name.endswith(f"{plain[0]}.weight")
    ]
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or module in kept:
            stored[name] = weight.half()
            weight.copy_(weight.half())
            continue
        parts, values = written(format, weight)
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        weight.copy_(values)
        formats[module] = format
    body = GPTQMethod.config_changes(formats, kept, {})["quantization_config",]
    whole = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": body}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, device_map="cpu")
    tokens = torch.arange(64).view(2, 32) * 3 % 256
    with torch.no_grad():
        found, wanted = loaded(tokens).logits.float(), expected(tokens).logits
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    quantized = [name for name, module in loaded.named_modules() if hasattr(module, "qweight")]
    assert set(quantized) == set(formats)


@pytest.mark.parametrize("keep", ["layers.0.mlp.down_proj", "self_attn", "layers.1.self_attn.k_proj"])
def test_gptqmodel_opens_a_file_with_plain_linears_in_its_blocks(gptqmodel: Any, tmp_path: Path, keep: str) -> None:
    """It looks at `dynamic` alone, and transformers at the list of modules alone."""
    base = opened.saved(tmp_path / "base", "llama", "LlamaForCausalLM")
    done = lora_merge.merge(base, [], tmp_path / "out", bits=4, format="gptq", keep=[keep])
    lora_merge.merge(tmp_path / "out", [], tmp_path / "plain", bits=16)
    count = opened.quantized(tmp_path / "out")
    assert 0 < count < 14 and done.notes
    assert opened_by_gptqmodel.compare(tmp_path / "out", tmp_path / "plain", count).right
