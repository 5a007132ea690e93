"""The classes of every backend satisfy the protocols of `clipmb.backends`; pyright checks it, nothing runs this."""

from __future__ import annotations

import clipmb.flax.engine
import clipmb.flax.training
import clipmb.pt.engine
import clipmb.pt.training
import clipmb.tf.engine
import clipmb.tf.training
from clipmb.backends import Engine, Trainer

ENGINES: list[type[Engine]] = [clipmb.pt.engine.Engine, clipmb.tf.engine.Engine, clipmb.flax.engine.Engine]
TRAINERS: list[type[Trainer]] = [clipmb.pt.training.Trainer, clipmb.tf.training.Trainer, clipmb.flax.training.Trainer]
