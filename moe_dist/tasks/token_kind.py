"""What the kinds of tasks share whose models predict tokens.

Shapes: B samples, S positions of targets, T targets of all samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_dist.losses.tokens import TokenScores, token_cross_entropy, token_kl
from moe_dist.losses.total import CountKind
from moe_dist.router_spec import router_facts
from moe_dist.tasks.kind import TaskKind
from moe_dist.tasks.output_layer import token_scores, without_output_layer

_NO_SETTINGS = ("transformers_version", "use_cache", "output_attentions", "output_hidden_states")


class TokenKind(TaskKind):
    """Predictions are what logits are made of, `TokenScores` of all targets of a batch."""

    prediction_term = "prediction_kl"
    distance = "KL divergence of the teacher's predicted token from the student's, in nats"
    count_kind: ClassVar[CountKind] = "targets"

    @abstractmethod
    def target_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which positions have a target, (B, S) bool."""

    @abstractmethod
    def target_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The targets, in the order of samples and positions, (T,)."""

    def run(self, model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
        """Run a model without its output layer: `logits` are what that reads, (B, S, D)."""
        with without_output_layer(model):
            return super().run(model, batch, use_cache=False, **options)

    def predictions(
        self, model: nn.Module, output: Any, batch: Mapping[str, Tensor]
    ) -> TokenScores:
        """What the logits of all targets are made of, in the order of samples and positions."""
        return token_scores(model, output.logits[self.target_mask(batch)])

    def losses(self, predictions: TokenScores, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy of each sample's targets, added up; (B,)."""
        return self._by_sample(token_cross_entropy(predictions, self.target_ids(batch)), batch)

    def prediction_errors(
        self,
        student: TokenScores,
        teacher: TokenScores,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """``KL(teacher‖student)`` at each sample's targets, added up; see `token_kl`."""
        return self._by_sample(token_kl(student, teacher, temperature), batch)

    def _by_sample(self, values_T: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Add values of all targets up for each sample, (B,)."""
        mask_BS = self.target_mask(batch)
        samples_T = torch.nonzero(mask_BS)[:, 0]
        return values_T.new_zeros(len(mask_BS)).index_add(0, samples_T, values_T)


def unread_settings(model: Any) -> dict[str, Any]:
    """Settings of a model's own for generation, in place of which the recipe's are taken."""
    own: dict[str, Any] = model.generation_config.to_diff_dict()
    return {
        name: value
        for name, value in own.items()
        if not name.startswith("_")
        and not name.endswith("_token_id")
        and name not in _NO_SETTINGS
        and value is not None
    }


def hides_tokens(config: Any) -> bool:
    """Whether its decoder's routers read all tokens so far, which a key-value cache hides.

    What gates of merged experts have read travels in the cache.
    """
    moe = getattr(config, "moe", None)
    if not moe or moe["num_experts"] == 1:
        return False
    facts = router_facts(moe["router"])
    return facts.chooses_by == "sentence" and not facts.merges
