"""Sequences instead of images: the encoder and the heads of the Long Range Arena (Tay et al. 2021, arXiv 2011.04006).

The model of the published numbers is that of Skyformer (Chen et al. 2021, arXiv 2111.00035): token and learned position
embedding, pre-LN encoder blocks, one pooled vector a document, and a classifier of two layers over it, or over two
documents. docs/lra.md tells what is known of the protocol.

Letters: B batch, N tokens, C channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import PolaSequenceAttention, open_gate
from .classifier import PREVIOUS, TrainableModel
from .layers import Grid, Mlp
from .options import DEEPEST_STAGE, AttentionOptions, attention_keywords, require_whole, value_of
from .registry import TOKENS, register_body

PADDING = 0  # the id of no symbol
POOLS = ("mean_padded", "mean_valid", "cls")


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


@register_body(["lra"], reads=TOKENS)
class SequenceClassifier(TrainableModel):
    """Token ids (B, N), or (B, 2, N) for pairs of documents, to logits (B, classes). Id 0 is padding.

    Args:
        length: positions that exist; shorter sequences use the first ones.
        vocabulary: rows of the token table, padding's included.
        pool: how a document becomes a vector. mean_padded: the sum over real tokens divided by N, as the published
            protocol does, so that it depends on how much padding follows; mean_valid: divided by the number of real
            tokens; cls: the output of a learned token before the first.
        documents: 1, or 2 that one encoder reads; their vectors a, b are classified as (a, b, a·b, a − b).
        attention: of AttentionOptions, what the blocks' attention is made of; `kernel_size` is 0 by default.

    Raises:
        ValueError: a pool, number of documents or heads, or option that does not fit; in the forward pass, ids of
            another shape or more than `length` tokens.
    """

    function_keys = ("MODEL.LA.ATTENTION", "MODEL.LA.GATE", "MODEL.LRA.POOL", "MODEL.LRA.NUM_HEADS")

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
        options = AttentionOptions.of({"kernel_size": 0, **attention})
        require_whole("MODEL.LRA.DEPTH (depth)", depth, high=DEEPEST_STAGE)
        for name, value in {"LENGTH": length, "VOCABULARY": vocabulary, "DIM": dim, "MLP_DIM": mlp_dim}.items():
            require_whole(f"MODEL.LRA.{name} ({name.lower()})", value, high=2**20)
        if pool not in POOLS:
            raise ValueError(f"MODEL.LRA.POOL (pool) {pool!r} is unknown, expected one of {', '.join(POOLS)}")
        if documents not in (1, 2):
            raise ValueError(f"MODEL.LRA.DOCUMENTS (documents) is {documents}, expected 1 or 2")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"MODEL.LRA.DIM {dim} does not divide by MODEL.LRA.NUM_HEADS {num_heads} (dim, num_heads)")
        self.length, self.vocabulary, self.pool, self.documents = length, vocabulary, pool, documents
        self.num_classes = num_classes
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.empty(1, length, dim))
        self.cls = nn.Parameter(torch.empty(1, 1, dim)) if pool == "cls" else None
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            EncoderBlock(PolaSequenceAttention(dim, num_heads, options), dim, mlp_dim, drop_rate) for _ in range(depth)
        )
        self.blocks.apply(open_gate)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        pooled = dim if documents == 1 else 4 * dim
        self.hidden = nn.Linear(pooled, mlp_dim)
        self.head = nn.Linear(mlp_dim, num_classes)
        self.grad_checkpointing = False
        for table in (self.token.weight, self.position, self.cls):
            if table is not None:
                nn.init.normal_(table, std=0.02)

    @classmethod
    def config_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        names = ("length", "vocabulary", "dim", "depth", "num_heads", "mlp_dim", "pool", "documents", "learn_scale")
        return {
            **attention_keywords(config),
            **{name: value_of(config, f"MODEL.LRA.{name.upper()}") for name in names},
            "kernel_size": value_of(config, "MODEL.LRA.KERNEL_SIZE"),
            "dropout": value_of(config, "MODEL.LRA.ATTENTION_DROP"),
            "drop_rate": value_of(config, "MODEL.DROP_RATE"),
        }

    @property
    def input_size(self) -> str:
        return f"{self.length} tokens"

    def example_input(self, batch: int) -> Tensor:
        documents = () if self.documents == 1 else (self.documents,)
        shape = (batch, *documents, self.length)
        return torch.randint(1, self.vocabulary, shape, device=self.position.device)

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
