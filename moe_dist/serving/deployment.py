"""The deployment of Ray Serve: a `TextService` in each replica, and what Serve does not count."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

from ray import serve
from ray.serve import metrics

from moe_dist.serving.batching import BatchFacts, ModelGoneError
from moe_dist.serving.model_process import start_model
from moe_dist.serving.requests import HttpRequest
from moe_dist.serving.service import TextService
from moe_dist.serving.settings import LOGGING, ServingSettings

APP_NAME = "moe-dist"
DEPLOYMENT = "model"
DRAIN_S = 60.0
"""A replica that is to go has so long for the requests that it has taken."""
RETRY_AFTER_S = 1.0
HEALTH_CHECK_S = 2.0
LEAVE_S = 0.1
"""For answers that are on their way when the model has ended."""
_BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


class Counters:
    """What Serve cannot know: texts, tokens, padding and batches of the model's calls."""

    def __init__(self) -> None:
        self._texts = metrics.Counter("moe_dist_texts", "Texts, or pairs, that were answered.")
        self._tokens = metrics.Counter("moe_dist_tokens", "Tokens that the model has read.")
        self._padding = metrics.Counter(
            "moe_dist_padding_tokens", "Positions of batches that held no token."
        )
        self._cut = metrics.Counter("moe_dist_truncated_texts", "Texts that were cut.")
        self._sizes = metrics.Histogram(
            "moe_dist_batch_size", "Texts in a call of the model.", boundaries=_BATCH_SIZES
        )

    def count_batch(self, facts: BatchFacts) -> None:
        """Count one call of the model."""
        for counter, number in (
            (self._texts, facts.num_texts),
            (self._tokens, facts.num_tokens),
            (self._padding, facts.num_padded),
        ):
            if number:  # Ray takes no 0.
                counter.inc(number)
        self._sizes.observe(facts.num_texts)

    def count_cut(self, num_texts: int) -> None:
        """Count texts that were cut."""
        self._cut.inc(num_texts)


class ServedModel:
    """A replica."""

    def __init__(self, values: dict[str, Any]) -> None:
        counters = Counters()
        settings = ServingSettings.of(**values)
        self._service = TextService(
            start_model(settings),
            settings,
            on_batch=counters.count_batch,
            on_cut=counters.count_cut,
        )

    async def __call__(self, request: Any) -> Any:
        """Answer a request of HTTP (one of starlette, with its answer)."""
        from starlette.responses import Response

        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        answer = await self._service.handle(
            HttpRequest(request.method, path, request.headers, request.stream())
        )
        if answer.status == 503:
            # A model that hangs is for Serve to judge.
            with suppress(RuntimeError):
                await self.check_health()
        return Response(
            answer.body,
            status_code=answer.status,
            headers=dict(answer.headers),
            media_type="application/json",
        )

    async def report(self) -> dict[str, Any]:
        """Say what is served, why so, and what it has read; see `TextService.report`."""
        return self._service.report()

    async def check_health(self) -> None:
        """Let Serve replace a replica that hangs; end this process if the model has ended.

        What comes next then goes to another replica; until Serve had asked three times it would
        come here. In the loop: from a thread it would close the socket that a call there waits for.
        """
        try:
            self._service.check()
        except ModelGoneError:
            asyncio.get_running_loop().call_later(LEAVE_S, os._exit, 1)
            raise


def build(args: dict[str, Any]) -> serve.Application:
    """Make the application; the `import_path` of a Serve configuration, whose `args` these are.

    They are those of `ServingSettings`; what does not fit is a ConfigError.
    """
    settings = ServingSettings.of(**args)
    deployment = serve.deployment(
        ServedModel,
        name=DEPLOYMENT,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.threads},
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_S},
        # New replicas answer before old ones go, and old ones finish what they have taken.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        # Often, since only then Serve sees that a replica has left.
        health_check_period_s=HEALTH_CHECK_S,
        # What a replica cannot load now it cannot load a second later.
        max_constructor_retry_count=1,
        logging_config=LOGGING,
    )
    return deployment.bind(settings.model_dump(mode="json"))
