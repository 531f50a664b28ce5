"""Extreme multi-label classification with sparse labels: which functions does a function call, by its docstring?

The modules of Python's standard library hold thousands of functions with a docstring, which call thousands of different
ones, four each. The labels are sparse from end to end: scikit-learn's CSR matrix becomes `fl.Labels`, and no dense
target of rows x classes is made to train on.
"""

import ast
import math
import sysconfig
from pathlib import Path

import torch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import MultiLabelBinarizer
from torch import Tensor, nn

import fused_losses as fl

texts, called = [], []
for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            texts.append(f"{node.name.replace('_', ' ')} {docstring}")
            callees = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            called.append({callee.attr for callee in callees if isinstance(callee, ast.Attribute)})
            called[-1] |= {callee.id for callee in callees if isinstance(callee, ast.Name)}

words = CountVectorizer(binary=True, min_df=2, token_pattern=r"[a-z]+").fit_transform(texts)  # (functions, words)
functions = MultiLabelBinarizer(sparse_output=True).fit_transform(called)  # (functions, classes)
classes = functions.shape[1]


def rows_of(matrix: csr_matrix, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row starts, and the columns of all: what EmbeddingBag and Labels take."""
    chosen = matrix[rows.numpy()]
    return torch.from_numpy(chosen.indptr).long(), torch.from_numpy(chosen.indices).long()


torch.manual_seed(0)
network = nn.EmbeddingBag(words.shape[1], 128, mode="mean", include_last_offset=True)
head = fl.LinearLoss(128, classes, loss=fl.HSLRLoss(k=50), bias=True)
nn.init.constant_(head.bias, -math.log(classes - 1))  # every function starts as one of that many
optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.03)

train, test = torch.randperm(len(texts)).tensor_split([len(texts) * 4 // 5])
for _ in range(10):
    for rows in train[torch.randperm(len(train))].split(256):
        starts, columns = rows_of(words, rows)
        labels = fl.Labels.from_csr(*rows_of(functions, rows))  # (rows, the most that one of them has)
        optimizer.zero_grad()
        head(network(columns, starts), labels).backward()
        optimizer.step()

starts, columns = rows_of(words, test)
with torch.no_grad():
    embeddings = network(columns, starts)
    labels = fl.Labels.from_csr(*rows_of(functions, test))
    dense = torch.from_numpy(functions[test.numpy()].toarray())  # what it replaces: the same loss, many times the bytes
    torch.testing.assert_close(head(embeddings, labels), head(embeddings, dense))
    nearest = head.topk(embeddings, 5).indices


def precision(guesses: Tensor) -> float:
    return dense.gather(1, guesses).double().mean().item()


popular = torch.from_numpy(functions[train.numpy()].sum(0)).topk(5).indices.expand(len(test), 5)
print(f"{len(texts)} functions call {classes} different ones")
print(f"labels of the test rows: {labels.index.nbytes / 1e6:.2f} MB, dense {dense.nbytes / 1e6:.0f} MB; the same loss")
for k in (1, 5):
    ours, most_called = precision(nearest[:, :k]), precision(popular[:, :k])
    print(f"precision@{k}: {ours:.1%}, of always guessing the most popular {most_called:.1%}")
    assert ours > 1.5 * most_called
