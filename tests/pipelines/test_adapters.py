"""Every spelling of an adapter becomes the same canonical form; everything else is refused by file, key and reason."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.errors import InvalidModel
from workers.pipelines.adapters import read_adapter
from workers.pipelines.factors import Adapter
from workers.pipelines.targets import aliases

from . import toys

Shapes = dict[str, tuple[int, ...]]
LAYERS = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "unet.down_blocks.0.resnets.1.conv1",
    "unet.down_blocks.0.attentions.0.proj_in",
    "text_encoder.encoder.layers.1.self_attn.v_proj",
)


@pytest.fixture
def made(sd_shapes: Shapes) -> toys.Changes:
    return toys.changes({layer: sd_shapes[f"{layer}.weight"] for layer in LAYERS})


def read(path: Path, shapes: Shapes) -> Adapter:
    return read_adapter(path, "hash", shapes, aliases(shapes))


def expect(adapter: Adapter, made: toys.Changes) -> None:
    assert set(adapter.factors) == {f"{layer}.weight" for layer in made}
    for layer, (down, up, alpha) in made.items():
        found = adapter.factors[f"{layer}.weight"]
        assert torch.equal(found.down, down)
        assert torch.equal(found.up, up)
        assert (found.alpha, found.rank) == (alpha, 4)
    assert adapter.changes_text is any(layer.startswith("text") for layer in made)


def test_kohya(tmp_path: Path, made: toys.Changes, sd_shapes: Shapes) -> None:
    expect(read(toys.kohya(tmp_path / "a.safetensors", made), sd_shapes), made)


def test_diffusers(tmp_path: Path, made: toys.Changes, sd_shapes: Shapes) -> None:
    expect(read(toys.diffusers_file(tmp_path / "a.safetensors", made), sd_shapes), made)


def test_diffusers_of_2023(tmp_path: Path, made: toys.Changes, sd_shapes: Shapes) -> None:
    tensors = {}
    for layer, (down, up, _) in made.items():
        if ".attn" in layer:
            name = layer.replace(".to_q", ".processor.to_q_lora").replace(".to_out.0", ".processor.to_out_lora")
        elif layer.startswith("text_encoder."):
            name = layer.replace("encoder.layers", "text_model.encoder.layers") + ".lora_linear_layer"
        else:
            name = f"{layer}.lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    expect(read(tmp_path / "a.safetensors", sd_shapes), {k: (d, u, 4.0) for k, (d, u, _) in made.items()})


def test_peft_folders(tmp_path: Path, made: toys.Changes, sd_shapes: Shapes) -> None:
    folders = {"unet": "unet", "text_encoder": "text_encoder_one"}
    expect(read(toys.peft_folder(tmp_path / "lora", made, folders), sd_shapes), made)


def test_a_bare_peft_folder_is_for_the_unet(tmp_path: Path, made: toys.Changes, sd_shapes: Shapes) -> None:
    unet = {layer: factors for layer, factors in made.items() if layer.startswith("unet.")}
    folder = toys.peft_folder(tmp_path / "lora", unet, {"unet": "unet"}) / "unet"
    expect(read(folder.rename(tmp_path / "bare"), sd_shapes), unet)


def test_peft_names_adapters_patterns_and_stabilised_ranks(
    tmp_path: Path, made: toys.Changes, sd_shapes: Shapes
) -> None:
    layer = LAYERS[0]
    down, up, _ = made[layer]
    bare = layer.removeprefix("unet.")
    tensors = {
        f"base_model.model.{bare}.lora_A.default.weight": down,
        f"base_model.model.{bare}.lora_B.default.weight": up,
    }
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = tmp_path / "lora" / "adapter_config.json"
    for body, alpha in (
        ({"r": 4, "lora_alpha": 3, "use_rslora": True}, 6.0),
        ({"r": 4, "lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 8}}, 8.0),
        ({}, 4.0),
    ):
        config.write_text(json.dumps(body))
        assert read(tmp_path / "lora", sd_shapes).factors[f"{layer}.weight"].alpha == alpha
    config.write_text(json.dumps({"use_dora": True}))
    with pytest.raises(InvalidModel, match="DoRA"):
        read(tmp_path / "lora", sd_shapes)


def test_both_text_encoders_and_original_block_names_of_sdxl(tmp_path: Path, sdxl_shapes: Shapes) -> None:
    """kohya's SDXL files number blocks as the original Stable Diffusion code does."""
    block = "transformer_blocks.1.attn2.to_k"
    names = {
        f"unet.down_blocks.1.attentions.0.{block}": f"lora_unet_input_blocks_4_1_{block.replace('.', '_')}",
        "unet.down_blocks.0.resnets.1.conv2": "lora_unet_input_blocks_2_0_out_layers_3",
        "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
        "unet.mid_block.attentions.0.proj_out": "lora_unet_middle_block_1_proj_out",
        "unet.mid_block.resnets.1.time_emb_proj": "lora_unet_middle_block_2_emb_layers_1",
        "unet.up_blocks.0.attentions.2.proj_in": "lora_unet_output_blocks_2_1_proj_in",
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
        "unet.up_blocks.1.resnets.0.conv_shortcut": "lora_unet_output_blocks_3_0_skip_connection",
        "unet.time_embedding.linear_1": "lora_unet_time_embed_0",
        "unet.add_embedding.linear_2": "lora_unet_label_emb_0_2",
        "text_encoder.encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder_2.encoder.layers.1.mlp.fc2": "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    }
    made = toys.changes({layer: sdxl_shapes[f"{layer}.weight"] for layer in names})
    tensors = {}
    for layer, (down, up, alpha) in made.items():
        tensors[f"{names[layer]}.lora_down.weight"] = down
        tensors[f"{names[layer]}.lora_up.weight"] = up
        tensors[f"{names[layer]}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "xl.safetensors")
    expect(read(tmp_path / "xl.safetensors", sdxl_shapes), made)
    expect(read(toys.kohya(tmp_path / "b.safetensors", made, toys.KOHYA_XL), sdxl_shapes), made)


def test_a_linear_layers_factors_may_be_written_as_a_1x1_convolution(tmp_path: Path, sd_shapes: Shapes) -> None:
    layer = LAYERS[0]
    ((down, up, _),) = toys.changes({layer: sd_shapes[f"{layer}.weight"]}).values()
    save_file(
        {f"{layer}.lora_A.weight": down[:, :, None, None].contiguous(), f"{layer}.lora_B.weight": up},
        tmp_path / "a.safetensors",
    )
    assert read(tmp_path / "a.safetensors", sd_shapes).factors[f"{layer}.weight"].rank == 4


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({f"{Q}.dora_scale": torch.ones(16)}, "dora_scale: DoRA"),
        ({f"{Q}.hada_w1_a": torch.ones(4, 16)}, "hada_w1_a: LoHa"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "lokr_w1: LoKr"),
        ({f"{Q}.lora_mid.weight": torch.ones(4, 4)}, "Tucker"),
        ({f"{Q}.diff": torch.ones(16, 16)}, "full-rank"),
        ({f"{Q}.surprise": torch.ones(1)}, "surprise: not a LoRA key"),
        ({"lora_unet_nowhere_to_q.lora_down.weight": torch.ones(4, 16)}, "nowhere.*no such layer.*base family"),
        ({"lora_te3_encoder.lora_down.weight": torch.ones(4, 16)}, "another model family"),
        ({f"{Q}.lora_down.weight": torch.ones(4, 17)}, "do not make a weight of"),
        ({f"{Q}.lora_up.weight": torch.ones(16, 5)}, "do not make a weight of"),
        ({f"{Q}.lora_down.weight": torch.ones(513, 16)}, "rank 513 is over the limit of 512"),
        ({f"{Q}.lora_down.weight": torch.full((4, 16), float("nan"))}, "lora_down.weight: holds NaN"),
        ({f"{Q}.lora_up.weight": torch.full((16, 4), float("inf"))}, "lora_up.weight: holds NaN or infinity"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, "alpha is NaN"),
        ({f"{Q}.alpha": torch.ones(2)}, "alpha must be one number"),
        ({f"{Q}.lora_up.weight": None}, "its up factor is missing"),
        ({f"{Q}.lora_down.weight": torch.ones((4, 16), dtype=torch.int32)}, "numbers of type I32"),
        ({f"{Q.replace('lora_unet', 'unet')}.lora_A.weight": torch.ones(4, 16)}, "no such layer"),
    ],
)
def test_refusals_name_file_key_and_reason(
    tmp_path: Path, sd_shapes: Shapes, changed: dict[str, torch.Tensor | None], reason: str
) -> None:
    good = toys.kohya(tmp_path / "style.safetensors", toys.changes({LAYERS[0]: sd_shapes[f"{LAYERS[0]}.weight"]}))
    tensors = {key: value for key, value in {**load_file(good), **changed}.items() if value is not None}
    save_file(tensors, good)
    with pytest.raises(InvalidModel, match=rf"style\.safetensors: .*{reason}"):
        read(good, sd_shapes)


def test_one_layer_spelt_twice_is_refused(tmp_path: Path, made: toys.Changes, sd_shapes: Shapes) -> None:
    one = {LAYERS[0]: made[LAYERS[0]]}
    first, second = toys.kohya(tmp_path / "a.safetensors", one), toys.diffusers_file(tmp_path / "b.safetensors", one)
    save_file(load_file(first) | load_file(second), tmp_path / "both.safetensors")
    with pytest.raises(InvalidModel, match="is already given by"):
        read(tmp_path / "both.safetensors", sd_shapes)


def test_an_sdxl_adapter_is_refused_for_sd(tmp_path: Path, sd_shapes: Shapes, sdxl_shapes: Shapes) -> None:
    layers = {name.removesuffix(".weight"): shape for name, shape in sdxl_shapes.items() if name.startswith("unet.")}
    with pytest.raises(InvalidModel, match="another base family"):
        read(toys.kohya(tmp_path / "xl.safetensors", toys.changes(layers)), sd_shapes)


def test_an_empty_folder_is_refused(tmp_path: Path, sd_shapes: Shapes) -> None:
    with pytest.raises(InvalidModel, match=r"holds no \.safetensors file"):
        read(tmp_path, sd_shapes)
    with pytest.raises(InvalidModel, match="no such file or folder"):
        read(tmp_path / "gone", sd_shapes)
