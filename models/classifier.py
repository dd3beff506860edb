"""What every model of this framework is: features, a mean over tokens, and a linear head."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.layers import Grid, init_weights


class Classifier(nn.Module, ABC):
    """Base of Pola-Swin and Pola-PVT: the head, and what loading and optimising need to know about a model.

    Subclasses set `num_features`, call `reset_classifier` once, and define `forward_features`.
    """

    # Ends of the names of entries in this family's files that the model derives instead of storing.
    derived_entries: tuple[str, ...] = ()
    # Parameters in this family's files that the released forward pass never used, and that stood before the head.
    unused_released_parameters: tuple[str, ...] = ()
    # Ends of the names of parameters that are not decayed although they have several dimensions.
    undecayed: tuple[str, ...] = ()

    num_features: int
    num_classes: int
    head: nn.Linear | nn.Identity

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to tokens (B, N, num_features)."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to the mean over tokens (B, C) and, unless `pre_logits`, to logits."""
        x = x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of storing them."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed although they have several dimensions."""
        return {name for name, _ in self.named_parameters() if self.undecayed and name.endswith(self.undecayed)}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a freshly initialised one; 0 classes: features only."""
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        like = next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        init_weights(self.head)

    @abstractmethod
    def position_grids(self) -> dict[str, Grid]:
        """(rows, columns) of each position table, by parameter name."""
