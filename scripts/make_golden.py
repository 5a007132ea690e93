"""Makes src/clipmb/data/golden: a tiny CLIP and what transformers 4.57.6 computes with it, for `clipmb doctor`.

Run it in the environment of `make test` (it needs the reference): ``python scripts/make_golden.py``. The weights are
random float16 numbers, the model computes in float64, and the results are stored as float32.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from clipmb import CLIPConfig, CLIPTokenizerFast
from clipmb.common.outputs import stages
from clipmb.common.parameters import specs

FOLDER = Path(__file__).parents[1] / "src/clipmb/data/golden"
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 13, "bos_token_id": 97, "eos_token_id": 98, "layer_norm_eps": 0.1, "hidden_act": "gelu",
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 20,
    "patch_size": 4, "layer_norm_eps": 0.1,
}  # fmt: skip
STRINGS = [
    "a photo of a cat",
    "Hello,  WORLD! it's 2 o'clock",
    "naïve café — 日本語 ☕️ 👩‍🚀",
    "&amp; <|endoftext|> don’t",
    "",
    "supercalifragilisticexpialidocious" * 2,
]


def main() -> None:
    rng = np.random.default_rng(0)
    config = CLIPConfig(TEXT, VISION, projection_dim=24, architectures=["CLIPModel"], dtype="float16")
    weights = {}
    for spec in specs(config, "CLIPModel"):
        values = rng.normal(1.0 if spec.kind == "norm scale" else 0.0, 0.3 if len(spec.shape) > 1 else 0.1, spec.shape)
        weights[spec.name] = np.asarray(2.0 if spec.name == "logit_scale" else values).astype(np.float16)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "config.json").write_text(config.to_json_string())
    save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})

    torch.set_default_dtype(torch.float64)  # the reference's text tower needs it for float64
    model = transformers.CLIPModel.from_pretrained(FOLDER, attn_implementation="sdpa", dtype=torch.float64).eval()
    ids = rng.integers(3, 97, (5, 11))
    ids[:, 0], ids[[0, 1, 2, 3, 4], [10, 5, 9, 10, 7]] = 97, 98
    mask = np.ones_like(ids)
    mask[1, 6:], mask[2, :3], mask[3, 4:6], mask[4] = 0, 0, 0, 0
    picture = rng.integers(0, 256, (37, 53, 3), np.uint8)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})(
        [picture, picture[::-1, ::-1].copy(), 255 - picture], return_tensors="np"
    )["pixel_values"]
    inputs = torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(pixels.astype(np.float64))
    with torch.no_grad():
        output = model(inputs[0], inputs[2], inputs[1], output_hidden_states=True)
        features = model.get_text_features(*inputs[:2]), model.get_image_features(inputs[2])
    vectors = {f"stage.{name}": value.numpy().astype(np.float32) for name, value in stages(output, *features).items()}
    vectors |= {"input_ids": ids, "attention_mask": mask, "picture": picture, "pixel_values": pixels}
    save_file({name: np.ascontiguousarray(value) for name, value in vectors.items()}, FOLDER / "vectors.safetensors")

    with tempfile.TemporaryDirectory() as folder:
        reference = transformers.CLIPTokenizerFast(*CLIPTokenizerFast().save_vocabulary(folder))
    tokens = {text: reference(text)["input_ids"] for text in STRINGS}
    (FOLDER / "tokens.json").write_text(json.dumps(tokens, indent=1) + "\n")
    (FOLDER / "README.md").write_text(
        "What transformers 4.57.6 computes with a tiny CLIP of random weights, for `clipmb doctor`.\n"
        "Made by `scripts/make_golden.py`; facts and random numbers, Apache-2.0 like the package.\n"
    )
    print(sum(path.stat().st_size for path in FOLDER.iterdir()), "bytes in", FOLDER)


if __name__ == "__main__":
    main()
