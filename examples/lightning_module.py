"""Lightning with `LinearLoss` as the head: training accuracy from logits that never exist, checkpoint, prediction."""

import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_losses as fl

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")  # of workers, which 1,797 digits do not need

images, digit = load_digits(return_X_y=True)
images, digit = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digit)  # (1797, 64), (1797,)
train = DataLoader(TensorDataset(images[:1024], digit[:1024]), batch_size=64, shuffle=True)
test = DataLoader(TensorDataset(images[1024:], digit[1024:]), batch_size=256)


class Classifier(lightning.LightningModule):
    def __init__(self, classes: int, k: int, lr: float):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        self.head = fl.LinearLoss(64, classes, loss=fl.HSLRLoss(k=k), normalize=True, scale="learned", logit_bias=True)

    def training_step(self, batch: list[Tensor], _) -> Tensor:
        images, target = batch
        loss, statistics = self.head(self.network(images), target, return_statistics=True)
        self.log("train_accuracy", statistics.correct.float().mean(), on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: list[Tensor], _) -> None:
        images, target = batch
        self.log("test_accuracy", (self(images) == target).float().mean())

    def forward(self, images: Tensor) -> Tensor:
        return self.head.predict(self.network(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


lightning.seed_everything(0, verbose=False)
model = Classifier(classes=10, k=3, lr=0.005)
trainer = lightning.Trainer(
    max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, train)
print(f"training accuracy of the last epoch: {trainer.callback_metrics['train_accuracy']:.1%}")

trainer.save_checkpoint("classifier.ckpt")
loaded = Classifier.load_from_checkpoint("classifier.ckpt")
[measured] = trainer.test(loaded, test, verbose=False)
print(f"test accuracy of the loaded checkpoint: {measured['test_accuracy']:.1%}")
assert measured["test_accuracy"] > 0.9
