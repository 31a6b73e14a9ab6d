"""What to expect of a server, and how many processors to give to each half.

Three arrangements answer the same questions with equally many processors: coupled (both halves on
the same ones, in turn), decoupled (DvD), and decoupled with a router that compresses tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cascadevl.errors import ConfigError
from cascadevl.planning.counts import Counts
from cascadevl.planning.hardware import Hardware
from cascadevl.planning.service import ModelService, Question
from cascadevl.planning.simulation import Layout, Load, Policy, Run, simulate

_MANY = 100
"""Requests for each language server that come at once, to see how long servers are busy."""

_ROOM = 0.8
"""Share of the memory for weights; the rest is for keys, values and what is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What there is to compute with.

    Attributes:
        hardware: Each processor.
        processors: How many.
        group: Processors of a language server, and of a coupled one.
        compute_share: Share of the hardware's operations a second that is reached.
        memory_share: Share of its bytes a second that is reached.
        link_bytes_per_s: Between the halves.
    """

    hardware: Hardware
    processors: int
    group: int
    compute_share: float
    memory_share: float = 0.8
    link_bytes_per_s: float = 25e9 / 8

    def service(self, counts: Counts, question: Question, *, coupled: bool) -> ModelService:
        """How long things take here.

        Args:
            counts: Of the model.
            question: What is asked.
            coupled: Whether all processors of a group encode together.
        """
        return ModelService(
            counts=counts,
            question=question,
            hardware=self.hardware,
            group=self.group,
            encoders=self.group if coupled else 1,
            compute_share=self.compute_share,
            memory_share=self.memory_share,
            link_bytes_per_s=self.link_bytes_per_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An arrangement, and what it does.

    Attributes:
        name: Of the arrangement.
        layout: Which servers there are.
        processors: That it takes.
        capacity_per_s: Requests a second at most.
        run: What becomes of requests at the rate that was asked for.
    """

    name: str
    layout: Layout
    processors: int
    capacity_per_s: float
    run: Run

    @property
    def processor_s(self) -> float:
        """Seconds of one processor that a request costs, when there is enough to do."""
        return self.processors / self.capacity_per_s

    def processors_for(self, rate: float, *, use: float = 0.9) -> int:
        """Processors for a rate, in whole sites of this size.

        Args:
            rate: Requests a second.
            use: Share of the capacity that is planned with.
        """
        return self.processors * math.ceil(rate / (use * self.capacity_per_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to expect.

    Attributes:
        options: Coupled, decoupled, decoupled with a router; those that the processors allow.
        ratio: Processors of the vision half to each of the language half at which neither waits.
        routed_ratio: The same with a router.
    """

    options: tuple[Option, ...]
    ratio: float
    routed_ratio: float


def make_plan(
    counts: Counts,
    question: Question,
    site: Site,
    load: Load,
    *,
    compressed_share: float = 2 / 3,
    policy: Policy | None = None,
) -> Plan:
    """Simulate the three arrangements.

    Args:
        counts: Of the model.
        question: What is asked, without a router.
        site: What there is to compute with.
        load: How requests come.
        compressed_share: Share of tiles that a router compresses. Two thirds leave half of the
            visual tokens, as the report has it.
        policy: How much is computed at once.

    Raises:
        ConfigError: If the processors are too few for the model.
    """
    policy = policy or Policy()
    check_memory(counts, site)
    routed = replace(question, compressed_share=compressed_share)
    both = counts.vision_bytes + counts.language_bytes
    options = []
    if site.processors >= site.group and _fits(both, site):
        layout = Layout(language=site.processors // site.group)
        options.append(_option("coupled", counts, question, site, layout, load, policy))
    for name, asked in (("DvD", question), ("DvD + router", routed)):
        layouts = list(_layouts(site))
        if layouts and asked.tiles:
            best = max(layouts, key=lambda layout: _capacity(counts, asked, site, layout, policy))
            options.append(_option(name, counts, asked, site, best, load, policy))
    return Plan(
        options=tuple(options),
        ratio=balance(counts, question, site, policy),
        routed_ratio=balance(counts, routed, site, policy),
    )


def balance(counts: Counts, question: Question, site: Site, policy: Policy | None = None) -> float:
    """Vision processors for each language processor at which both halves have equally much to do.

    Args:
        counts: Of the model.
        question: What is asked.
        site: What there is to compute with.
        policy: How much is computed at once.
    """
    if not question.tiles:
        return 0.0
    service = site.service(counts, question, coupled=False)
    # As many vision servers as requests: the language half never waits for one.
    run = simulate(
        service, question.ask(counts), Layout(vision=_MANY), _at_once(_MANY), policy or Policy()
    )
    return run.vision_busy_s / (site.group * run.language_busy_s)


def smallest_group(counts: Counts, hardware: Hardware) -> int:
    """Fewest processors, a power of two, that hold a whole model with room for keys and values.

    Args:
        counts: Of the model.
        hardware: Each of them.
    """
    whole = counts.vision_bytes + counts.language_bytes
    return int(2 ** max(0, math.ceil(math.log2(whole / (_ROOM * hardware.memory_bytes)))))


def check_memory(counts: Counts, site: Site) -> None:
    """See whether the halves fit.

    Raises:
        ConfigError: If one does not, or there are too few processors for a server.
    """
    if site.processors < site.group:
        raise ConfigError(
            f"a language server of {site.group} processors is asked for, but there are "
            f"{site.processors}; take more, or a smaller group"
        )
    if counts.vision_bytes > _ROOM * site.hardware.memory_bytes:
        raise ConfigError(
            f"the vision half weighs {counts.vision_bytes / 1e9:.0f} GB, too much for one "
            f"{site.hardware.name} of {site.hardware.memory_bytes / 1e9:.0f} GB"
        )
    if not _fits(counts.language_bytes, site):
        raise ConfigError(
            f"the language half weighs {counts.language_bytes / 1e9:.0f} GB, but {site.group} x "
            f"{site.hardware.name} have {site.group * site.hardware.memory_bytes / 1e9:.0f} GB, of "
            f"which {_ROOM:.0%} may be weights; a group of "
            f"{smallest_group(counts, site.hardware)} holds it"
        )


def _fits(weight_bytes: float, site: Site) -> bool:
    return weight_bytes <= _ROOM * site.group * site.hardware.memory_bytes


def _layouts(site: Site) -> Iterator[Layout]:
    """All ways to share the processors out among the halves."""
    for language in range(1, site.processors // site.group + 1):
        vision = site.processors - language * site.group
        if vision:
            yield Layout(language=language, vision=vision)


def _capacity(
    counts: Counts, question: Question, site: Site, layout: Layout, policy: Policy
) -> float:
    """Requests a second at most: when the servers that have most to do are always busy."""
    service = site.service(counts, question, coupled=not layout.vision)
    number = _MANY * layout.language
    run = simulate(service, question.ask(counts), layout, _at_once(number), policy)
    if not layout.vision:
        return number * layout.language / (run.vision_busy_s + run.language_busy_s)
    link_s = number * service.transfer_s()
    half_s = max(run.vision_busy_s, link_s) / layout.vision
    return number / max(half_s, run.language_busy_s / layout.language)


def _at_once(number: int) -> Load:
    return Load(rate=math.inf, num_requests=number)


def _option(
    name: str,
    counts: Counts,
    question: Question,
    site: Site,
    layout: Layout,
    load: Load,
    policy: Policy,
) -> Option:
    service = site.service(counts, question, coupled=not layout.vision)
    return Option(
        name=name,
        layout=layout,
        processors=layout.vision + layout.language * site.group,
        capacity_per_s=_capacity(counts, question, site, layout, policy),
        run=simulate(service, question.ask(counts), layout, load, policy),
    )
