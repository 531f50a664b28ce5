"""Hugging Face's Trainer with a loss from logits: `compute_loss_func`, `num_items_in_batch`, gradient accumulation.

A small language model learns the reference manual of Python, which ships with it. Sentences differ in length, so the
mean over accumulated batches is no mean of their means: the Trainer hands over the number of tokens of them all, by
which the sum of the losses is divided.

Its `label_smoothing_factor` is not heeded beside a `compute_loss_func`: give `label_smoothing=` to the loss.
"""

import re
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import fused_losses as fl

sentences = [re.findall(r"\w+|[^\w\s]", text) for text in re.split(r"(?<=[.:])\s+", " ".join(topics.values()))]
sentences = [words for words in sentences if 4 <= len(words) <= 40][:1024]
vocabulary = {word: number for number, word in enumerate(sorted({word for words in sentences for word in words}))}
tokens = [torch.tensor([vocabulary[word] for word in words]) for words in sentences]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


def train(compute_loss_func, batch_size: int) -> list[float]:
    """The loss of each step, always of 64 sentences."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **size))
    arguments = TrainingArguments(
        "out",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=64 // batch_size,
        num_train_epochs=3,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, collate, tokens, compute_loss_func=compute_loss_func)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


criterion = fl.CrossEntropyLoss(reduction="sum")


def next_token_loss(outputs, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # -100 is ignored
    return criterion(logits, target) / num_items_in_batch


own = train(None, batch_size=64)  # the model's own loss
whole, accumulated = (train(next_token_loss, batch_size) for batch_size in (64, 16))
for step, losses in enumerate(zip(own, whole, accumulated, strict=True)):
    if step % 16 == 0:
        print(f"step {step}: the model's own loss {losses[0]:.3f}, ours {losses[1]:.3f}, accumulated {losses[2]:.3f}")
torch.testing.assert_close(torch.tensor(whole), torch.tensor(own), rtol=0, atol=2e-3)
torch.testing.assert_close(torch.tensor(accumulated), torch.tensor(own), rtol=0, atol=2e-3)

criterion = fl.HSLRLoss(k=50, alpha=10, reduction="sum")  # another loss is one line
hardest = train(next_token_loss, batch_size=16)
print(f"over the 50 hardest of {len(vocabulary)} words: {hardest[0]:.3f} at first, {hardest[-1]:.3f} at last")
assert hardest[-1] < 0.7 * hardest[0]
