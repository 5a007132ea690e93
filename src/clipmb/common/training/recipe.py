"""How a model is trained: every number that the result depends on, and the rules that follow from them.

The same recipe gives the same training in every framework. It is saved in the training state, so that a run can be
resumed from its folder alone.
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
TOWERS = {  # the prefixes of the parameters that are frozen with a tower
    "text": ("text_model.", "text_projection."),
    "vision": ("vision_model.", "visual_projection."),
}

MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_BIAS = -10.0
LOGIT_BIAS = Spec("logit_bias", "raw", (), mean=INITIAL_LOGIT_BIAS)  # belongs to the sigmoid loss, not to the model


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
    """The hyperparameters of a training run.

    Defaults are those of CLIP's ViT models where the paper gives them (table 18).

    Attributes:
        steps: Optimizer steps of the run, at least 1; the schedule ends with them.
        batch_size: Pairs in one step, over all devices. Each pair has the rest of the batch as its negatives.
        loss: "clip", the symmetric cross-entropy, or "siglip", the pairwise sigmoid loss (arXiv 2303.15343).
        local_loss: Compute only each device's own rows of the similarity matrix: the same gradient in less memory.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up before the cosine decay to zero.
        betas: Decay rates of AdamW's two moments, each in [0, 1).
        eps: AdamW's epsilon, added to the square root of the bias-corrected second moment.
        weight_decay: Decoupled weight decay of matrices, kernels and embedding tables.
        clip_norm: Largest global norm of the gradient; None or 0 for no clipping.
        precision: Compute precision of the towers: "float32", "bfloat16" (parameters and loss stay float32) or
            "float64".
        chunk_size: Pairs that a process encodes at once by gradient caching (arXiv 2101.06983): the same result in the
            memory of one chunk, for a second forward pass. None for all.
        gradient_checkpointing: Recompute the blocks in the backward pass instead of keeping their intermediate results.
        freeze: Towers that are not trained: (), ("text",) or ("vision",).
        distributed: "none", "data" (each device has a copy of the model) or "fsdp" (each device has a part of every
            parameter and moment).
        seed: Seed for data order, augmentation and dropout, at least 0.

    Raises:
        ValueError: A field has an impossible value.

    Source: CLIP, arXiv 2103.00020, section 2.5 and appendix F.
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
            raise bad_input("betas must be two numbers in [0, 1)", self.betas, "Pass for example (0.9, 0.98)")
        for name, allowed in (("loss", LOSSES), ("precision", PRECISIONS), ("distributed", DISTRIBUTED)):
            if getattr(self, name) not in allowed:
                raise one_of(name, getattr(self, name), allowed)
        if unknown := [tower for tower in self.freeze if tower not in TOWERS]:
            raise one_of("freeze", unknown[0], tuple(TOWERS))
        if len(set(self.freeze)) == len(TOWERS):
            raise bad_input("At least one tower must be trained", self.freeze, "Freeze one tower, or none")

    @property
    def parameter_dtype(self) -> str:
        """The dtype of parameters and moments: that of the loss."""
        return "float64" if self.precision == "float64" else "float32"

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then half a cosine to zero.

        Args:
            step: The number of the step, from 0.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def trains(self, spec: Spec) -> bool:
        """Whether a parameter is trained: its tower is not frozen."""
        return not spec.name.startswith(tuple(stem for tower in self.freeze for stem in TOWERS[tower]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from what `to_dict` returned.

        Raises:
            ValueError: A field is unknown or its value impossible.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise bad_input(f"The fields of a recipe are {', '.join(known)}", unknown, "Remove or correct them")
        return cls(**values)


def decays(spec: Spec) -> bool:
    """Whether weight decay applies to a parameter: it applies to matrices, kernels and embedding tables only.

    Biases, norms, the class embedding, logit_scale and logit_bias are not decayed.

    Source: "all weights that are not gains or biases" (CLIP, arXiv 2103.00020, section 2.5), decided by the number of
    axes, as in open_clip.
    """
    return bool(KINDS[spec.kind].pt) and len(spec.shape) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
