"""Trains the small model that ships with clipmb, on the images and captions that prepare.py wrote.

    python examples/emoji/train.py build/emoji/data build/emoji/run

The run is a fixed number of steps; killed, it continues from its last saved state when started again. Every random
choice depends on the seed and the number of the step alone, not on the number of processes. What it adds to clipmb's
own training, because images are few and artists are what must be generalised over:

- A batch has CONCEPTS emoji, each drawn by two artists: the loss is that of captions and images, plus half that of
  images and images of the same emoji by the other artist.
- A caption that is true of several emoji of the batch ("red", "animal") counts as a right answer for each.
- Half the patches of an image are left out (arXiv 2212.00794), but for the last steps.
- Muon (https://kellerjordan.github.io/posts/muon) on the matrices, AdamW on the rest.
- Backgrounds, small affine changes, scale and colour change from step to step. Images are never mirrored: flags,
  arrows and hands would become others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipmb import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast, Recipe
from clipmb.pt.losses import clip_loss, normalize

SIZE, PATCH, WIDTH, LAYERS, CONTEXT = 64, 8, 128, 4, 32  # pixels, pixels, of both towers, of both towers, tokens
SYMBOLS, MERGES = 512, 4000  # the first tokens of CLIP's vocabulary are bytes, the next are made by its first merges
CONCEPTS = 192
PATCHES_KEPT = 32  # of 64, until the last WHOLE_STEPS
WHOLE_STEPS = 0.06  # of the run
MUON_RATE, ADAMW_RATE, WARMUP_STEPS = 6e-3, 1.5e-3, 50
WEIGHT_DECAY = 0.1
MAX_LOGIT_SCALE = math.log(100)
PICTURES_WEIGHT = 0.5
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}")
VALIDATION = {"artists": ("noto", "fxemoji"), "pictures": 240}  # seen in no step; each has other images of its emoji


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("out", type=Path, help="where the run keeps its state, and the model at the end")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="they share the batch; one core each")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved states and validations")
    parser.add_argument("--stop-after", type=int, help="end early, at this step, as a kill would")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    torch.multiprocessing.spawn(train, (arguments,), arguments.processes)


def train(rank: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    count = arguments.processes
    dist.init_process_group("gloo", rank=rank, world_size=count)
    processor = build_processor()
    data = Data(arguments.data, processor.tokenizer)
    torch.manual_seed(arguments.seed)
    model = CLIPModel(build_config(processor.tokenizer)).train()
    schedule = Recipe(steps=arguments.steps, learning_rate=1.0, warmup_steps=WARMUP_STEPS)
    optimizers = build_optimizers(model)
    start, state = 0, arguments.out / "state.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start = saved["step"]
    for step in range(start, arguments.steps):
        if step == arguments.stop_after:
            break
        began = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * schedule.rate(step)
            optimizer.zero_grad(set_to_none=True)
        kept = PATCHES_KEPT if step < (1 - WHOLE_STEPS) * arguments.steps else None
        batch = data.batch((arguments.seed, step), kept)
        losses = backward(model, data, batch, rank, count)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if rank == 0:
            line = {"step": step + 1, **losses, "scale": model.logit_scale.exp().item()}
            done = step + 1
            if done % arguments.save_every == 0 or done == arguments.steps:
                line |= validate(model, data)
                torch.save(
                    {"step": done, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]},
                    state.with_suffix(".part"),
                )
                state.with_suffix(".part").replace(state)
            line["seconds"] = time.perf_counter() - began
            shown = {name: round(value, 4) for name, value in line.items()}
            print(json.dumps(shown), flush=True)
            with (arguments.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(shown) + "\n")
    if rank == 0:
        save(model, processor, arguments.out / "model")
    dist.destroy_process_group()


# The model.


def build_processor() -> CLIPProcessor:
    """Makes the tokenizer of the first merges of CLIP's list, which are a tokenizer too, and the image processor."""
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = map(Path, CLIPTokenizerFast().save_vocabulary(folder))
        ids = json.loads(vocab.read_text("utf-8"))
        tokens = [*sorted(ids, key=ids.get)[: SYMBOLS + MERGES], "<|startoftext|>", "<|endoftext|>"]
        vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
        lines = merges.read_text("utf-8").splitlines()
        merges.write_text("\n".join(lines[: 1 + MERGES]) + "\n", "utf-8")  # the first line is a comment
        tokenizer = CLIPTokenizerFast(vocab, merges, model_max_length=CONTEXT)
    size = {"height": SIZE, "width": SIZE}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size), tokenizer)


def build_config(tokenizer: CLIPTokenizerFast) -> CLIPConfig:
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "projection_dim": WIDTH}
    shared |= {"num_hidden_layers": LAYERS, "num_attention_heads": WIDTH // 32}
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(text, {**shared, "image_size": SIZE, "patch_size": PATCH}, projection_dim=WIDTH)


def save(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Writes the checkpoint in float16."""
    arrays = {name: value.half() for name, value in model.state_dict().items()}
    half = CLIPModel(model.config).half()
    half.load_state_dict(arrays)
    half.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_optimizers(model: CLIPModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and projections, AdamW for embeddings, norms, biases and the scale."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    known = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    found = [Muon(matrices, MUON_RATE, WEIGHT_DECAY), torch.optim.AdamW(groups, ADAMW_RATE, betas=(0.9, 0.98))]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["highest"] = group["lr"]
    return found


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, but orthogonalising in float32 (bfloat16 is slow on processors without it) and many at once."""

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter from its gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                directions = orthogonal(torch.stack(updates))
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices (count, rows, columns), by five Newton-Schulz steps. Source: Muon's post."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


# The data.


@dataclass
class Batch:
    """What one step trains on; the first half of the rows is one artist's, the second half another's.

    Attributes:
        pictures: (rows,) indices of images.
        input_ids: rows of ids.
        truth: (rows, rows), whether a caption (column) is true of an image (row).
        affine: (rows, 2, 3), from places in the changed image to places in the image.
        background: (rows, 3), colours in [0, 1].
        colour: (rows, 5): brightness, contrast, and the gain of red, green and blue.
        saturation: (rows,).
        patches: (rows, kept) of the patches that are left, or None.
    """

    pictures: np.ndarray
    input_ids: list[list[int]]
    truth: np.ndarray
    affine: np.ndarray
    background: np.ndarray
    colour: np.ndarray
    saturation: np.ndarray
    patches: np.ndarray | None


class Data:
    """All images, (images, 4, SIZE, SIZE) in uint8 with premultiplied alpha, and all captions."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.emoji = json.loads((folder / "labels.json").read_text("utf-8"))
        index = {entry["hexcode"]: i for i, entry in enumerate(self.emoji)}
        lines = [json.loads(line) for line in (folder / "images.jsonl").read_text("utf-8").splitlines()]
        lines = [line for line in lines if line["split"] == "train"]
        self.pictures = np.stack([read_picture(folder / line["file_name"]) for line in lines])
        self.concept = np.array([index[line["hexcode"]] for line in lines])
        self.of_concept: list[list[int]] = [[] for _ in self.emoji]
        for i, concept in enumerate(self.concept):
            self.of_concept[concept].append(i)
        rng = np.random.default_rng(0)
        places = [i for i, line in enumerate(lines) if line["artist"] in VALIDATION["artists"]]
        places = [i for i in places if len(self.of_concept[self.concept[i]]) > 3]
        self.validation = np.sort(rng.choice(places, VALIDATION["pictures"], replace=False))
        for i in self.validation:
            self.of_concept[self.concept[i]].remove(int(i))
        self.concepts = np.array([i for i, pictures in enumerate(self.of_concept) if pictures])
        self.tags = [tuple(entry["tags"]) for entry in self.emoji]
        self.tag_sets = [frozenset(tags) for tags in self.tags]
        self._ids: dict[str, list[int]] = {}

    def batch(self, seed: tuple[int, int], kept: int | None) -> Batch:
        """Draws what a step trains on."""
        rng = np.random.default_rng(seed)
        concepts = rng.choice(self.concepts, CONCEPTS, replace=False)
        first, second = [], []
        for concept in concepts:
            pictures = self.of_concept[concept]
            chosen = rng.choice(pictures, 2, replace=len(pictures) < 2)
            first.append(chosen[0])
            second.append(chosen[1])
        owners = np.concatenate([concepts, concepts])
        texts, truth = [], np.zeros((len(owners), len(owners)), bool)
        for column, concept in enumerate(owners):
            tags = self.tags[concept]
            if tags and rng.random() < 0.4:
                chosen_tags = list(rng.choice(tags, min(len(tags), rng.integers(1, 5)), replace=False))
                texts.append(", ".join(chosen_tags))
                wanted = set(chosen_tags)
                true = np.array([wanted <= self.tag_sets[other] for other in concepts])
            else:
                texts.append(TEMPLATES[rng.integers(len(TEMPLATES))].replace("{}", self.emoji[concept]["label"]))
                true = concepts == concept
            truth[:, column] = np.concatenate([true, true])
        rows = len(owners)
        background = np.where(rng.random((rows, 1)) < 0.6, 1.0, rng.random((rows, 3)))
        colour = 1 + rng.uniform(-1, 1, (rows, 5)) * (0.2, 0.3, 0.12, 0.12, 0.12)
        patches = None
        if kept is not None:
            patches = np.sort(np.argsort(rng.random((rows, (SIZE // PATCH) ** 2)), axis=1)[:, :kept], axis=1)
        return Batch(
            pictures=np.array(first + second),
            input_ids=[self.ids(text) for text in texts],
            truth=truth,
            affine=random_affine(rng, rows),
            background=background.astype(np.float32),
            colour=colour.astype(np.float32),
            saturation=rng.uniform(0.5, 1.4, rows).astype(np.float32),
            patches=patches,
        )

    def ids(self, text: str) -> list[int]:
        """The ids of a text, computed once."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text, truncation=True, max_length=CONTEXT)["input_ids"]
        return self._ids[text]

    def pixels(self, batch: Batch, rows: slice) -> Tensor:
        """The changed images of some rows: (rows, 3, SIZE, SIZE), normalised."""
        raw = torch.from_numpy(self.pictures[batch.pictures[rows]]).float().div_(255)  # (rows, 4, SIZE, SIZE)
        grid = F.affine_grid(torch.from_numpy(batch.affine[rows]), raw.shape, align_corners=False)
        moved = F.grid_sample(raw, grid, align_corners=False)
        background = torch.from_numpy(batch.background[rows])[:, :, None, None]
        image = moved[:, :3] + (1 - moved[:, 3:]) * background
        brightness, contrast, *_ = gains = torch.from_numpy(batch.colour[rows]).T[:, :, None, None, None]
        grey = image.mean(dim=1, keepdim=True)
        image = grey + (image - grey) * torch.from_numpy(batch.saturation[rows])[:, None, None, None]
        image = image * brightness * torch.cat(list(gains[2:]), dim=1)
        middle = image.mean(dim=(1, 2, 3), keepdim=True)
        image = (middle + (image - middle) * contrast).clamp_(0, 1)
        return standardize(image)

    def plain_pixels(self, pictures: np.ndarray) -> Tensor:
        """Images as they are, on white."""
        raw = torch.from_numpy(self.pictures[pictures]).float().div_(255)
        return standardize(raw[:, :3] + (1 - raw[:, 3:]))


def read_picture(path: Path) -> np.ndarray:
    values = np.asarray(Image.open(path)).astype(np.float32)  # (SIZE, SIZE, 4)
    values[..., :3] *= values[..., 3:] / 255
    return values.round().astype(np.uint8).transpose(2, 0, 1)


def random_affine(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Small turns, scales, stretches and shifts."""
    angle = rng.uniform(-12, 12, rows) * np.pi / 180
    scale = 1 / np.exp(rng.uniform(np.log(0.72), np.log(1.15), rows))
    stretch = np.exp(rng.uniform(-0.1, 0.1, rows))
    shift = rng.uniform(-0.12, 0.12, (rows, 2))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = np.stack([cos * stretch, -sin / stretch, shift[:, 0], sin * stretch, cos / stretch, shift[:, 1]], axis=1)
    return matrix.reshape(rows, 2, 3).astype(np.float32)


def standardize(image: Tensor) -> Tensor:
    processor = CLIPImageProcessor()
    mean = torch.tensor(processor.image_mean)[:, None, None]
    return image.sub_(mean).div_(torch.tensor(processor.image_std)[:, None, None])


# The step.


def backward(model: CLIPModel, data: Data, batch: Batch, rank: int, count: int) -> dict[str, float]:
    """Fills in the gradient of the whole batch; each process encodes its part of the rows."""
    rows = len(batch.pictures)
    part = slice(rows * rank // count, rows * (rank + 1) // count)
    patches = None if batch.patches is None else torch.from_numpy(batch.patches[part])
    own_images = normalize(image_features(model, data.pixels(batch, part), patches))
    own_texts = normalize(text_features(model, batch.input_ids[part]))
    images = gather(own_images, count).requires_grad_()
    texts = gather(own_texts, count).requires_grad_()
    scale = model.logit_scale.detach().clone().requires_grad_()
    captions = true_captions_loss(texts, images, scale, torch.from_numpy(batch.truth))
    half = rows // 2
    artists = clip_loss(images[:half], images[half:], scale)
    (captions + PICTURES_WEIGHT * artists).backward()
    torch.autograd.backward([own_images, own_texts], [images.grad[part], texts.grad[part]])
    model.logit_scale.grad = scale.grad / count  # it is the same in every process, and they are summed
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, values in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))
    return {"captions": captions.item(), "artists": artists.item()}


def gather(own: Tensor, count: int) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(parts, own.detach().contiguous())
    return torch.cat(parts)


def true_captions_loss(texts: Tensor, images: Tensor, scale: Tensor, truth: Tensor) -> Tensor:
    """Symmetric cross-entropy where an image may have several true captions and a caption several images.

    Args:
        texts: (rows, proj), of unit length.
        images: The same.
        scale: Logarithm of the factor of the similarities.
        truth: (rows, rows), images by captions.
    """
    logits = scale.exp() * images @ texts.T
    right = truth.to(logits.dtype)
    of_images = F.cross_entropy(logits, right / right.sum(dim=1, keepdim=True))
    of_texts = F.cross_entropy(logits.T, right.T / right.T.sum(dim=1, keepdim=True))
    return (of_images + of_texts) / 2


def image_features(model: CLIPModel, pixels: Tensor, kept: Tensor | None) -> Tensor:
    """The vision tower over the kept patches only: (rows, 3, SIZE, SIZE) to (rows, proj)."""
    if kept is None:
        return model.get_image_features(pixels)
    tower = model.vision_model
    kernel = tower.embeddings.patch_embedding.weight.flatten(1)  # (width, 3 * PATCH * PATCH)
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # (rows, patches, 3 * PATCH * PATCH)
    patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))  # (rows, kept, 3 * PATCH * PATCH)
    positions = tower.embeddings.position_embedding.weight
    states = patches @ kernel.T + positions[kept + 1]
    first = (tower.embeddings.class_embedding + positions[0]).expand(len(states), 1, -1)
    states = tower.encoder(tower.pre_layrnorm(torch.cat([first, states], dim=1))).last_hidden_state
    return model.visual_projection(tower.post_layernorm(states[:, 0]))


def text_features(model: CLIPModel, rows: list[list[int]], pieces: int = 3) -> Tensor:
    """The text tower over texts of similar length at a time: rows of ids to (rows, proj)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    features = []
    for piece in np.array_split(order, pieces):
        longest = max(len(rows[i]) for i in piece)
        ids = torch.full((len(piece), longest), model.config.text_config.pad_token_id)
        for place, i in enumerate(piece):
            ids[place, : len(rows[i])] = torch.tensor(rows[i])
        features.append(model.get_text_features(ids))
    return torch.cat(features)[torch.tensor(order).argsort()]


@torch.no_grad()
def validate(model: CLIPModel, data: Data) -> dict[str, float]:
    """How often the right label of all is the first, or among the first five, for the images kept from training."""
    model.eval()
    classes = sum(
        normalize(text_features(model, [data.ids(template.replace("{}", entry["label"])) for entry in data.emoji], 20))
        for template in (TEMPLATES[0], TEMPLATES[2])
    )
    images = model.get_image_features(data.plain_pixels(data.validation))
    model.train()
    best = (images @ normalize(classes).T).topk(5).indices
    hits = best == torch.from_numpy(data.concept[data.validation])[:, None]
    return {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}


if __name__ == "__main__":
    main()
