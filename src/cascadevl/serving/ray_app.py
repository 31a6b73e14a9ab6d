"""Both halves as Ray Serve deployments: replicas on many hosts, placed, watched and scaled by Ray.

In each replica the very server of `cascadevl serve --role` runs in a thread, and joins the front as
it would from a process of its own. Requests, features and tokens go past Ray, over the same wire;
what Ray does is to find a host for each replica, to start it again when its server has died, and to
add and remove replicas by what they have in hand. The extra `cluster` is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cascadevl.errors import ConfigError, ServerError
from cascadevl.serving.member import MemberThread
from cascadevl.serving.members import MemberSettings, make_member
from cascadevl.serving.wire import Role

_LOG = logging.getLogger(__name__)
_LOAD = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many replicas of a half there are, and where.

    Attributes:
        least: Replicas at least.
        most: Replicas at most; as many as ``least`` for a fixed number.
        load: Requests in hand for each replica; with more there will be more replicas.
        cpus: Cores that a replica takes of its host.
        gpus: GPUs that it takes.
        resources: Further resources, by which hosts are told apart, as ``{"vision": 1}`` of hosts
            that were started with ``ray start --resources '{"vision": 4}'``.
    """

    least: int = 1
    most: int = 1
    load: float = 8.0
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: If it cannot.
        """
        if not 1 <= self.least <= self.most or not self.load > 0:
            raise ConfigError(
                f"{self.least} to {self.most} replicas with {self.load} requests each; at least 1, "
                f"no fewer at most than at least, and more than 0 requests are needed"
            )


class Half:
    """A replica: a vision or language server in a thread of an actor."""

    def __init__(self, settings: MemberSettings) -> None:
        """Open the half, and let its server join the front.

        Args:
            settings: What it is made of; a language server takes features at its host's address.
        """
        at = f"tcp://{ray.util.get_node_ip_address()}:0" if settings.role == "language" else ""
        self._member = make_member(replace(settings, features_at=at))
        self._thread = MemberThread(self._member)

    def check_health(self) -> None:
        """Say whether the server works; Ray starts another replica if it does not.

        Raises:
            ServerError: If it has ended.
        """
        if not self._thread.is_alive:
            raise ServerError(f"{self._thread.name} has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the server has in hand."""
        stats = self._member.stats()
        return {_LOAD: float(stats.running + stats.waiting)}

    def __del__(self) -> None:
        """Stop the server; Ray calls this when it removes the replica."""
        if "_thread" in self.__dict__:  # the checkpoint could be opened
            self._thread.close()


class ByLoad:
    """Ray's question of how many replicas a half wants, answered by what they have in hand."""

    def __init__(self, least: int, most: int, load: float) -> None:
        """Know the limits, see `Scale`."""
        self._least, self._most, self._load = least, most, load

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Answer; nothing is remembered until the next time.

        Args:
            context: What Ray knows of the half.
        """
        loads = (context.aggregated_metrics or {}).get(_LOAD, {})
        wanted = math.ceil(sum(loads.values()) / self._load)
        return max(self._least, min(self._most, wanted)), {}


def missing_resources(scale: Scale, offered: Mapping[str, float]) -> list[str]:
    """Of what the hosts of a cluster offer less than the replicas take that there are at least.

    The replicas wait for it: a cluster that starts hosts by itself may offer it later.

    Args:
        scale: Of a half.
        offered: By all hosts together, as Ray names it.

    Returns:
        Each in words, with both numbers.
    """
    taken = {"CPU": scale.cpus, "GPU": scale.gpus, **scale.resources}
    return [
        f"{name} ({offered.get(name, 0.0):g} of {scale.least * each:g})"
        for name, each in taken.items()
        if offered.get(name, 0.0) < scale.least * each
    ]


@contextmanager
def halves(
    settings: MemberSettings, vision: Scale, language: Scale, *, address: str | None = None
) -> Iterator[None]:
    """Run both halves as deployments while the context lasts.

    Args:
        settings: What their servers are made of; the role is that of each.
        vision: How many vision servers there are.
        language: How many language servers.
        address: Of the Ray cluster; None for one on this machine alone, which ends with it.
    """
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")  # the front speaks HTTP
        offered = ray.cluster_resources()
        scales: dict[Role, Scale] = {"vision": vision, "language": language}
        for role, scale in scales.items():
            if missing := missing_resources(scale, offered):
                wanted = ", ".join(missing)
                _LOG.warning("ray: the %s half waits for hosts that offer %s", role, wanted)
            own = replace(settings, role=role)
            serve.run(_deployment(role, scale).bind(own), name=_app(role), route_prefix=None)
            _LOG.info("ray: the %s half has %d replicas", role, scale.least)
        yield
    finally:
        for role in get_args(Role):
            serve.delete(_app(role))
        if address is None:
            serve.shutdown()
        ray.shutdown()


def _app(role: Role) -> str:
    return f"cascadevl-{role}"


def _deployment(role: Role, scale: Scale) -> serve.Deployment:
    limits = {"least": scale.least, "most": scale.most, "load": scale.load}
    return serve.deployment(
        Half,
        name=role,
        ray_actor_options={
            "num_cpus": scale.cpus,
            "num_gpus": scale.gpus,
            "resources": scale.resources,
        },
        health_check_period_s=2.0,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.least,
            initial_replicas=scale.least,
            max_replicas=scale.most,
            upscale_delay_s=5.0,
            downscale_delay_s=60.0,
            look_back_period_s=15.0,
            policy=AutoscalingPolicy(policy_function=ByLoad, policy_kwargs=limits),
        ),
    )
