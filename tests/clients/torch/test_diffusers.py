"""diffusers: a tiny Stable Diffusion pipeline with our text encoder, tokenizer and image encoder."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload, cpu_offload_with_hook
from cases import TEXT, VISION
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import clipmb
from clipmb import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

PROMPT = "a photo of a cat"


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    clipmb.register("diffusers")
    clipmb.register("diffusers")


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a text encoder, an image encoder and a tokenizer that both libraries read."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    text = clipmb.CLIPTextConfig(**{**TEXT, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407})
    text.max_position_embeddings = 77
    CLIPTextModel(text).save_pretrained(folder / "text")
    CLIPVisionModelWithProjection(clipmb.CLIPVisionConfig(**VISION)).save_pretrained(folder / "vision")
    CLIPTokenizer().save_pretrained(folder / "tokenizer")
    CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}).save_pretrained(
        folder / "processor"
    )
    return folder


def components(parts, library) -> dict:
    torch.manual_seed(0)
    width = TEXT["hidden_size"]
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    return {
        "unet": unet.eval(), "vae": vae.eval(), "scheduler": diffusers.DDIMScheduler(), "safety_checker": None,
        "text_encoder": library.CLIPTextModel.from_pretrained(parts / "text").eval(),
        "tokenizer": library.CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        "image_encoder": library.CLIPVisionModelWithProjection.from_pretrained(parts / "vision").eval(),
        "feature_extractor": library.CLIPImageProcessor.from_pretrained(parts / "processor"),
        "requires_safety_checker": False,
    }  # fmt: skip


@pytest.fixture
def ours(parts):
    return diffusers.StableDiffusionPipeline(**components(parts, clipmb))


@pytest.fixture
def theirs(parts):
    return diffusers.StableDiffusionPipeline(**components(parts, transformers))


def draw(pipe, prompt=PROMPT, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "height": 8, "width": 8, "output_type": "np", **options}
    return pipe(prompt, generator=seeded, **options).images


def test_images_are_those_of_the_classes_of_transformers(ours, theirs):
    for options in ({}, {"negative_prompt": "a dog"}, {"prompt": ["a dog", "two cats"]}):
        np.testing.assert_allclose(draw(ours, **options), draw(theirs, **options), atol=1e-5)
    assert not np.allclose(draw(ours), draw(ours, "a dog"), atol=1e-3)
    ids = theirs.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        skipped = theirs.text_encoder.final_layer_norm(states)
    found = draw(ours, guidance_scale=1.0, clip_skip=1)
    np.testing.assert_allclose(found, draw(theirs, None, guidance_scale=1.0, prompt_embeds=skipped), atol=1e-5)


def test_ours_replace_the_components_of_a_folder(ours, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    names = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **{name: getattr(ours, name) for name in names})
    assert all(getattr(pipe, name) is getattr(ours, name) for name in names)
    np.testing.assert_array_equal(draw(pipe), draw(ours))
    with pytest.raises(ValueError, match="should be"):
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=ours.tokenizer)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_saved_pipeline_keeps_ours(ours, theirs, tmp_path, variant):
    ours.save_pretrained(tmp_path, variant=variant)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["clipmb", "CLIPTextModel"]
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant)
    for name in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"):
        assert type(getattr(again, name)) is type(getattr(ours, name)), name
    np.testing.assert_array_equal(draw(again), draw(ours))
    half = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant=variant, torch_dtype=torch.bfloat16)
    assert half.text_encoder.dtype == torch.bfloat16
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant, text_encoder=theirs.text_encoder)


def lora_files(pipe, folder) -> None:
    """LoRA weights of both the UNet and the text encoder, as diffusers saves them."""
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    pipe.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
    )  # fmt: skip


def test_lora(parts, ours, theirs, tmp_path):
    lora_files(diffusers.StableDiffusionPipeline(**components(parts, clipmb)), tmp_path)
    plain = draw(ours)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert ours.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    with_lora = draw(ours)
    nothing = {"cross_attention_kwargs": {"scale": 0.0}}
    assert not np.allclose(with_lora, plain, atol=1e-3)
    np.testing.assert_allclose(with_lora, draw(theirs), atol=1e-5)
    np.testing.assert_allclose(draw(ours, **nothing), plain, atol=1e-5)
    for change in (
        lambda pipe: pipe.set_adapters("style", 0.5),
        lambda pipe: pipe.set_adapters("style", {"unet": 0.0, "text_encoder": 1.0}),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(components=["unet", "text_encoder"]),
        lambda pipe: pipe.unfuse_lora(components=["unet", "text_encoder"]),
        lambda pipe: pipe.delete_adapters("style"),
    ):
        change(ours)
        change(theirs)
        np.testing.assert_allclose(draw(ours), draw(theirs), atol=1e-5)
    np.testing.assert_allclose(draw(ours), plain, atol=1e-6)


def test_unloaded_lora_leaves_the_text_encoder_as_it_was(ours, tmp_path):
    plain = draw(ours)
    names = list(ours.text_encoder.state_dict())
    lora_files(ours, tmp_path)
    ours.unload_lora_weights()
    ours.load_lora_weights(tmp_path)
    ours.unload_lora_weights()
    assert list(ours.text_encoder.state_dict()) == names
    np.testing.assert_array_equal(draw(ours), plain)
    ours.save_pretrained(tmp_path / "pipe")
    np.testing.assert_array_equal(draw(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")), plain)


def test_textual_inversion(ours, theirs, tmp_path):
    torch.manual_seed(2)
    width = TEXT["hidden_size"]
    prompt = "a photo of <style> and <thing>"
    plain, size = draw(ours, prompt), len(ours.tokenizer)
    embeddings = [{"<style>": torch.randn(width)}, {"<thing>": torch.randn(3, width)}]
    for pipe in (ours, theirs):
        for each in embeddings:
            pipe.load_textual_inversion(each)
    assert len(ours.tokenizer) == size + 4
    assert ours.text_encoder.get_input_embeddings().weight.shape[0] == size + 4
    assert not np.allclose(draw(ours, prompt), plain, atol=1e-3)
    np.testing.assert_allclose(draw(ours, prompt), draw(theirs, prompt), atol=1e-5)
    ours.save_pretrained(tmp_path / "with")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "with")
    np.testing.assert_array_equal(draw(again, prompt), draw(ours, prompt))

    for pipe in (ours, theirs):
        pipe.unload_textual_inversion("<style>")
    assert ours.tokenizer.get_added_vocab().keys() == theirs.tokenizer.get_added_vocab().keys()
    np.testing.assert_allclose(draw(ours, prompt), draw(theirs, prompt), atol=1e-5)
    for pipe in (ours, theirs):
        pipe.unload_textual_inversion()
    assert len(ours.tokenizer) == size
    np.testing.assert_allclose(draw(ours, prompt), plain, atol=1e-6)
    ours.save_pretrained(tmp_path / "without")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "without")
    np.testing.assert_array_equal(draw(again, prompt), plain)


def test_ip_adapter(ours, theirs):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    torch.manual_seed(3)
    width, wide = TEXT["hidden_size"], ours.image_encoder.config.projection_dim
    projection = {"proj.weight": torch.randn(4 * width, wide), "proj.bias": torch.randn(4 * width),
                  "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}  # fmt: skip
    attention = {}
    crossing = [name for name in ours.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        out = ours.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in ("k", "v"):
            attention[f"{2 * number + 1}.to_{kind}_ip.weight"] = torch.randn(out, width)
    plain = draw(ours)
    for pipe in (ours, theirs):
        pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": attention}, subfolder="", weight_name="")
        pipe.set_ip_adapter_scale(1.0)
    found = draw(ours, ip_adapter_image=picture)
    assert not np.allclose(found, plain, atol=1e-3)
    np.testing.assert_allclose(found, draw(theirs, ip_adapter_image=picture), atol=1e-5)


def test_group_offloading(ours, tmp_path):
    plain = draw(ours)
    for module in (ours.text_encoder, ours.unet):
        diffusers.hooks.apply_group_offloading(
            module, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
            offload_type="leaf_level", offload_to_disk_path=str(tmp_path),
        )  # fmt: skip
    np.testing.assert_array_equal(draw(ours), plain)


def test_offloading_as_pipelines_do_it(ours):
    """`enable_model_cpu_offload` and `enable_sequential_cpu_offload` need an accelerator; these are their hooks."""
    plain = draw(ours)
    parts = (ours.text_encoder, ours.unet, ours.vae)
    hook = None
    for module in parts:
        _, hook = cpu_offload_with_hook(module, "cpu", prev_module_hook=hook)
    np.testing.assert_array_equal(draw(ours), plain)
    ours.remove_all_hooks()
    for module in parts:
        cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)
    assert all(parameter.is_meta for parameter in ours.text_encoder.parameters())
    np.testing.assert_array_equal(draw(ours), plain)


def test_device_map_of_a_pipeline(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, device_map="cpu")
    np.testing.assert_array_equal(draw(again), draw(ours))
