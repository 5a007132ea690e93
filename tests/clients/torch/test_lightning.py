"""Lightning: a module around our model is trained, checkpointed and resumed, and its checkpoint is read by us."""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader

from clipmb import CLIPModel, convert


class Training(lightning.LightningModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = CLIPModel.from_pretrained(folder)

    def training_step(self, batch, index):
        return self.model(**batch, return_loss=True).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_training_and_its_checkpoint(folder, inputs, expected, tmp_path):
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False,
    )  # fmt: skip
    module = Training(str(folder))
    trainer.fit(module, DataLoader(rows, batch_size=2))
    saved = next(tmp_path.rglob("*.ckpt"))
    with torch.no_grad():
        after = module.model.eval()(**inputs).logits_per_image
        assert float((after - expected).abs().max()) > 1e-3
        again = Training.load_from_checkpoint(saved).eval()
        assert torch.equal(again.model(**inputs).logits_per_image, after)
        ours = CLIPModel.from_pretrained(saved, config=folder)
        assert torch.equal(ours(**inputs).logits_per_image, after)
        convert(saved, tmp_path / "converted", config=folder)
        assert torch.equal(CLIPModel.from_pretrained(tmp_path / "converted")(**inputs).logits_per_image, after)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    resumed = Training(str(folder))
    trainer.fit(resumed, DataLoader(rows, batch_size=2), ckpt_path=saved, weights_only=False)
    assert trainer.global_step == 6
