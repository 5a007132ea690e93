"""How a model is trained: every number that the result depends on, and the rules that follow from them.

The same recipe gives the same training in every framework; it is written into the training state, so that a run can be
continued from its folder alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipmb.common.errors import bad_input, one_of, whole_number
from clipmb.common.parameters import KINDS, Spec

LOSSES = ("clip", "siglip")
PRECISIONS = ("float32", "bfloat16", "float64")
DISTRIBUTED = ("none", "data", "fsdp")
TOWERS = {  # what is frozen with a tower: the beginnings of the names of its parameters
    "text": ("text_model.", "text_projection."),
    "vision": ("vision_model.", "visual_projection."),
}

MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_BIAS = -10.0
LOGIT_BIAS = Spec("logit_bias", "raw", (), mean=INITIAL_LOGIT_BIAS)  # of the sigmoid loss; no part of the model


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: The number of this one, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run. Defaults are those of CLIP's ViT models where the paper has them (table 18).

    Source: CLIP, arXiv 2103.00020, section 2.5 and appendix F.

    Attributes:
        steps: Optimizer steps of the whole run, which the schedule is made for.
        batch_size: Pairs in one step, over all devices: the others of a pair's batch are its negatives.
        loss: "clip", the symmetric cross-entropy, or "siglip", the pairwise sigmoid loss (arXiv 2303.15343).
        local_loss: Every device computes only the rows of the similarity matrix of its own pairs; the same gradient
            with less memory.
        learning_rate: The highest of the schedule.
        warmup_steps: Steps of linear warm-up before the cosine decay to zero.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's epsilon, added to the root of the corrected second moment.
        weight_decay: AdamW's decoupled decay of matrices, kernels and embedding tables.
        clip_norm: The largest global norm of the gradient; None or 0 for no clipping.
        precision: What the towers compute in: "float32", "bfloat16" (parameters and loss stay float32) or "float64".
        chunk_size: Pairs that a process encodes at once, by gradient caching (arXiv 2101.06983): exact, in the memory
            of one chunk, for the price of a second forward pass. None for the whole batch.
        gradient_checkpointing: Recompute the blocks in the backward pass instead of keeping their intermediate results.
        freeze: Towers that stay as they are: (), ("text",), ("vision",).
        distributed: "none"; "data": every device has the whole model; "fsdp": every device has a part of each
            parameter and moment.
        seed: Of the order of the data, of augmentation and of dropout.
    """

    steps: int
    batch_size: int = 256
    loss: str = "clip"
    local_loss: bool = False
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    clip_norm: float | None = 1.0
    precision: str = "float32"
    chunk_size: int | None = None
    gradient_checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    distributed: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists
        object.__setattr__(self, "freeze", tuple(self.freeze))
        object.__setattr__(self, "clip_norm", self.clip_norm or None)
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0), ("chunk_size", 1)):
            if name != "chunk_size" or self.chunk_size is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name in ("learning_rate", "eps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not (name == "clip_norm" and value is None) and not (_is_number(value) and value >= 0):
                raise bad_input(f"{name} must be a number of at least 0", value, f"Correct {name}")
        if len(self.betas) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise bad_input("betas must be two numbers in [0, 1)", self.betas, "Pass such as (0.9, 0.98)")
        for name, allowed in (("loss", LOSSES), ("precision", PRECISIONS), ("distributed", DISTRIBUTED)):
            if getattr(self, name) not in allowed:
                raise one_of(name, getattr(self, name), allowed)
        if unknown := [tower for tower in self.freeze if tower not in TOWERS]:
            raise one_of("freeze", unknown[0], tuple(TOWERS))
        if len(set(self.freeze)) == len(TOWERS):
            raise bad_input("One tower at least must be trained", self.freeze, "Freeze one tower, or none")

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0: linear warm-up, then half a cosine to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def trains(self, spec: Spec) -> bool:
        """Tells whether a parameter is trained: whether its tower is not frozen."""
        return not spec.name.startswith(tuple(stem for tower in self.freeze for stem in TOWERS[tower]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Makes a recipe of what `to_dict` returned.

        Raises:
            ValueError: A field is unknown or its value impossible.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise bad_input(f"A recipe has the fields {', '.join(known)}", unknown, "Remove or correct them")
        return cls(**values)


def decays(spec: Spec) -> bool:
    """Tells whether weight decay applies to a parameter: to matrices, kernels and embedding tables only.

    Not to biases, norms, the class embedding, logit_scale and logit_bias: "weights that are not gains or biases" (the
    paper), read as open_clip reads it, by the number of axes.
    """
    return bool(KINDS[spec.kind].pt) and len(spec.shape) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
