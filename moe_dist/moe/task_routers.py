"""Routers that choose by the task alone: learned scores of each task, or a fixed table.

Shapes: B batch, T tokens, D model, E experts, K active experts, N tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_dist.errors import MissingInputError
from moe_dist.moe.experts import compute_dtype
from moe_dist.moe.gates import Gate, random_start, repeat_rows, repeated
from moe_dist.moe.hash_router import TableRouter
from moe_dist.moe.on_device import bring
from moe_dist.moe.routing import Routing, RoutingContext

# Above the random start of a task's scores, so that tasks begin spread over the experts.
TASK_START = 0.1


class TaskGate(Gate):
    """Sends all tokens of a task to the same experts, by learned scores of the task.

    Args:
        num_tasks: N.
        num_experts: experts to choose from, E.
        top_k: experts for each task, K.
        gate_scale: see `Gate`.
        noise: see `Gate`; drawn once for a sample.
        seed: of the start, at which a task's own experts (`spread_tasks`) lie far ahead.

    Source: task-level routing, arXiv:2110.03742; a table of scores, in place of a gate on a task
        embedding, is ours.
    """

    def __init__(
        self,
        num_tasks: int,
        num_experts: int,
        *,
        top_k: int = 1,
        gate_scale: str = "straight_through",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_experts, top_k=top_k, gate_scale=gate_scale, noise=noise, seed=seed)
        self.num_tasks = num_tasks
        self.task_scores = nn.Parameter(torch.empty(num_tasks, num_experts))
        if not self.task_scores.is_meta:
            start = random_start(num_tasks, num_experts, seed)
            start.scatter_add_(
                1,
                spread_tasks(num_tasks, num_experts, top_k),
                torch.full((num_tasks, top_k), TASK_START),
            )
            with torch.no_grad():
                self.task_scores.copy_(start)

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Choose the experts of each sample's task, which the context carries, for all its tokens.

        Tasks that are missing or unknown are a MissingInputError.
        """
        tasks_B = bring(read_task_ids(hidden_TD, context, self.num_tasks), hidden_TD.device)
        if tasks_B.numel() == 1 and context is not None and context.sample_ids is not None:
            # Each sample draws its own noise, though their task is named once.
            tasks_B = tasks_B.expand(context.sample_ids.numel())
        logits_BE = self.task_scores.float()[tasks_B]
        routing = self.choose(logits_BE, compute_dtype(hidden_TD), context)
        return repeated(routing, hidden_TD.shape[0] // max(1, tasks_B.numel()))


class TaskTable(TableRouter):
    """Sends all tokens of a task to fixed experts; the table is saved with the model.

    Args:
        table: (N,) or (N, K) int64 expert ids.
        num_experts: experts to choose from, E.

    Raises:
        ConversionError: if the table holds no rows or ids that are not experts.
    """

    def rows(self, hidden_TD: Tensor, context: RoutingContext | None) -> Tensor:
        """Take the task of each token's sample; missing or unknown ones: see `read_task_ids`."""
        tasks_B = bring(read_task_ids(hidden_TD, context, self.table.shape[0]), hidden_TD.device)
        length = hidden_TD.shape[0] // max(1, tasks_B.numel())
        return repeat_rows(tasks_B.unsqueeze(1), length).squeeze(1)


def spread_tasks(num_tasks: int, num_experts: int, top_k: int) -> Tensor:
    """Give every task K experts, all E in turn, in every layer alike: (N, K) int64."""
    turns_NK = torch.arange(num_tasks * top_k, device="cpu").view(num_tasks, top_k)
    return turns_NK % num_experts


def read_task_ids(
    hidden_TD: Tensor,
    context: RoutingContext | None,
    num_tasks: int,
    *,
    router: str = "task_gate",
) -> Tensor:
    """Give the tasks of the samples, or the one of all, where the context has them.

    Bad ones are a MissingInputError, of those on a device their number alone.
    """
    num_tokens = hidden_TD.shape[0]
    given = None if context is None else context.task_ids
    if given is None:
        if num_tasks > 1:
            raise MissingInputError(
                f"{router} knows {num_tasks} tasks, and this forward call names none",
                remedy="run the model inside use_context(RoutingContext(task_ids=...)), one id "
                "for each sample",
            )
        given = torch.zeros(1, dtype=torch.int64, device="cpu")
    tasks_B = given.reshape(-1)
    if tasks_B.numel() == 0 or num_tokens % tasks_B.numel():
        raise MissingInputError(
            f"{router} has the tasks of {tasks_B.numel()} samples for {num_tokens} tokens",
            remedy="give one task id for each sample of the batch",
        )
    # An export knows no values.
    is_known = tasks_B.device.type == "cpu" and not torch.compiler.is_exporting()
    if is_known and not 0 <= int(tasks_B.min()) <= int(tasks_B.max()) < num_tasks:
        raise MissingInputError(
            f"task ids {sorted(set(tasks_B.tolist()))} are not all among the {num_tasks} tasks of "
            "this model",
            remedy=f"number the tasks from 0 to {num_tasks - 1}",
        )
    return tasks_B
