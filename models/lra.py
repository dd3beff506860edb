"""Sequences instead of images: the encoder and the heads of the Long Range Arena (Tay et al. 2021, arXiv 2011.04006).

The model of the published numbers is that of Skyformer (Chen et al. 2021, arXiv 2111.00035): token and learned position
embedding, pre-LN encoder blocks, one pooled vector a document, and a classifier of two layers over it, or over two
documents. docs/lra.md tells what is known of the protocol.

Letters: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from yacs.config import CfgNode

from models.attention import PolaSequenceAttention
from models.classifier import PREVIOUS, TrainableModel
from models.layers import Grid, Mlp

PADDING = 0  # the id of no symbol


class EncoderBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), with dropout after each."""

    def __init__(self, attention: PolaSequenceAttention, dim: int, mlp_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = attention
        self.drop = nn.Dropout(drop_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, mlp_dim, drop_rate)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """x (B, N, C); key_mask (B, N) bool, True for real tokens."""
        x = x + self.drop(self.attn(self.norm1(x), key_mask))
        return x + self.mlp(self.norm2(x))


class SequenceClassifier(TrainableModel):
    """Token ids (B, N), or (B, 2, N) for pairs of documents, to logits (B, classes). Id 0 is padding.

    Args:
        length: positions that exist; shorter sequences use the first ones.
        vocabulary: rows of the token table, padding's included.
        pool: how a document becomes a vector. mean_padded: the sum over real tokens divided by N, as the published
            protocol does, so that it depends on how much padding follows; mean_valid: divided by the number of real
            tokens; cls: the output of a learned token before the first.
        documents: 1, or 2 that one encoder reads; their vectors a, b are classified as (a, b, a·b, a − b).
        attention: arguments of PolaSequenceAttention.

    Raises:
        ValueError: in the forward pass, for ids of another shape or more than `length` tokens.
    """

    undecayed = ("power", "scale", "position", "token.weight", "cls")

    def __init__(
        self,
        *,
        length: int,
        vocabulary: int,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        mlp_dim: int = 128,
        pool: str = "mean_padded",
        documents: int = 1,
        num_classes: int = 10,
        drop_rate: float = 0.1,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.length, self.vocabulary, self.pool, self.documents = length, vocabulary, pool, documents
        self.num_classes = num_classes
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.empty(1, length, dim))
        self.cls = nn.Parameter(torch.empty(1, 1, dim)) if pool == "cls" else None
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            EncoderBlock(PolaSequenceAttention(dim, num_heads, **attention), dim, mlp_dim, drop_rate)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        pooled = dim if documents == 1 else 4 * dim
        self.hidden = nn.Linear(pooled, mlp_dim)
        self.head = nn.Linear(mlp_dim, num_classes)
        self.grad_checkpointing = False
        for table in (self.token.weight, self.position, self.cls):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    def forward_features(self, ids: Tensor) -> Tensor:
        """Ids (B, N) to one vector a document (B, C)."""
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.length:
            raise ValueError(
                f"received ids of shape {tuple(ids.shape)}, expected (batch, 1 to {self.length} tokens) for"
                f" {self.documents} document(s) a sample"
            )
        mask = ids != PADDING
        x = self.token(ids) + self.position[:, : ids.shape[1]]
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
            mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        x = self.drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        x = self.norm(x)
        if self.cls is not None:
            return x[:, 0]
        total = x.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
        if self.pool == "mean_padded":
            return total / x.shape[1]
        return total / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def forward(self, ids: Tensor) -> Tensor:
        if self.documents == 1:
            vector = self.forward_features(ids)
        else:
            if ids.ndim != 3 or ids.shape[1] != 2:
                raise ValueError(f"received ids of shape {tuple(ids.shape)}, expected (batch, 2 documents, tokens)")
            a, b = self.forward_features(ids.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
            vector = torch.cat([a, b, a * b, a - b], dim=1)
        return self.head(self.hidden(vector).relu())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^token|^position|^cls", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", PREVIOUS)]}

    def position_grids(self) -> dict[str, Grid]:
        """None: positions of a sequence are not resized."""
        return {}


def sequence_arguments(config: CfgNode) -> dict[str, Any]:
    """What a configuration says to the constructor of `SequenceClassifier`, apart from the number of classes."""
    return {
        "length": config.MODEL.LRA.LENGTH,
        "vocabulary": config.MODEL.LRA.VOCABULARY,
        "dim": config.MODEL.LRA.DIM,
        "depth": config.MODEL.LRA.DEPTH,
        "num_heads": config.MODEL.LRA.NUM_HEADS,
        "mlp_dim": config.MODEL.LRA.MLP_DIM,
        "pool": config.MODEL.LRA.POOL,
        "documents": config.MODEL.LRA.DOCUMENTS,
        "drop_rate": config.MODEL.DROP_RATE,
        "kernel_size": config.MODEL.LRA.KERNEL_SIZE,
        "dropout": config.MODEL.LRA.ATTENTION_DROP,
        "learn_scale": config.MODEL.LRA.LEARN_SCALE,
        "alpha": config.MODEL.LA.ALPHA,
        "backend": config.MODEL.LA.BACKEND,
        "attention": config.MODEL.LA.ATTENTION,
        "learn_exponent": config.MODEL.LA.LEARN_EXPONENT,
        "gate": config.MODEL.LA.GATE,
    }
