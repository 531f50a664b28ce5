"""Hugging Face's Trainer with `LinearLoss` as the head of a language model: while it trains there are no logits.

Logits of all tokens and all words, and their gradient, are what fills the memory when a language model is trained.
`LinearLoss` takes the place of `lm_head`, under the same names in the state dict, and computes the loss from the hidden
states; what has been trained so is loaded into the ordinary model, which generates.
"""

import re
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import fused_losses as fl


class LinearLossLlamaForCausalLM(LlamaForCausalLM):  # "ForCausalLM" tells the Trainer which labels to count
    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        criterion = fl.CrossEntropyLoss(reduction="sum")
        self.lm_head = fl.LinearLoss(config.hidden_size, config.vocab_size, loss=criterion)

    def forward(self, input_ids, labels, num_items_in_batch=None, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state  # (sentences, words, features)
        target = labels[:, 1:].flatten()  # -100 is ignored
        loss = self.lm_head(hidden[:, :-1].flatten(0, 1), target)
        return {"loss": loss / ((target != -100).sum() if num_items_in_batch is None else num_items_in_batch)}


# The reference manual of Python, which ships with it.
sentences = [re.findall(r"\w+|[^\w\s]", text) for text in re.split(r"(?<=[.:])\s+", " ".join(topics.values()))]
sentences = [words for words in sentences if 4 <= len(words) <= 40][:1024]
words = sorted({word for words in sentences for word in words})
number = {word: index for index, word in enumerate(words)}
tokens = [torch.tensor([number[word] for word in sentence]) for sentence in sentences]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


arguments = TrainingArguments(
    "out",
    per_device_train_batch_size=16,
    gradient_accumulation_steps=4,
    num_train_epochs=3,
    learning_rate=3e-3,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)
plain, ours = LlamaForCausalLM(config), LinearLossLlamaForCausalLM(config)
ours.load_state_dict(plain.state_dict())  # the names are the same
curves = []
for model in (plain, ours):
    trainer = Trainer(model, arguments, collate, tokens)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curves.append([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
print(f"with logits: {curves[0][0]:.3f} at first, {curves[0][-1]:.3f} at last")
print(f"without:     {curves[1][0]:.3f} at first, {curves[1][-1]:.3f} at last")
torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=0, atol=2e-3)

plain.load_state_dict(ours.state_dict())
batch = collate(tokens[:16])
with torch.no_grad():
    torch.testing.assert_close(plain.eval()(**batch).loss, ours.eval()(**batch)["loss"])
print("loaded into the ordinary model: the same loss")
