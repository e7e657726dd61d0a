"""Routers, experts and the layer that joins them, in plain torch."""

from moe_dist.moe.capacity import Capacity
from moe_dist.moe.dispatch import Dispatcher, LocalDispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.gates import SentenceGate, TokenGate
from moe_dist.moe.hash_router import HashRouter
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.merge import Merges
from moe_dist.moe.merge_gates import (
    MergeGate,
    SequenceMergeGate,
    TaskMergeGate,
    TokenMergeGate,
)
from moe_dist.moe.merged_layer import MergedLayer
from moe_dist.moe.routers import ROUTERS, build_router
from moe_dist.moe.routing import (
    LayerRouting,
    Router,
    Routing,
    RoutingContext,
    RoutingRecord,
    checkpoint_context_fn,
    current_context,
    install_routing_hooks,
    record_routing,
    use_context,
)
from moe_dist.moe.task_routers import TaskGate, TaskTable
from moe_dist.router_spec import RouterSpec

__all__ = [
    "ROUTERS",
    "Capacity",
    "Dispatcher",
    "Experts",
    "HashRouter",
    "LayerRouting",
    "LocalDispatcher",
    "MergeGate",
    "MergedLayer",
    "Merges",
    "MoELayer",
    "Router",
    "RouterSpec",
    "Routing",
    "RoutingContext",
    "RoutingRecord",
    "SentenceGate",
    "SequenceMergeGate",
    "TaskGate",
    "TaskMergeGate",
    "TaskTable",
    "TokenGate",
    "TokenMergeGate",
    "build_router",
    "checkpoint_context_fn",
    "current_context",
    "install_routing_hooks",
    "record_routing",
    "use_context",
]
