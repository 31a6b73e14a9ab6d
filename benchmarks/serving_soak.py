"""Many clients for a long time: no answer lost, none twice, none of another's, and no memory grows.

Each client asks one question after the other, of several sizes; one in five leaves in the middle.
The server computes every answer as if it ran alone (``--batch-invariant``), so that each can be
compared with the answer to the same question on the idle server before.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from serving_arms import Served
from serving_client import Wish, ask

_SIZES_PX = (0, 112, 224, 336)
_LENGTHS = (8, 24, 60)
_SETTLE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What became of the requests.

    Attributes:
        asked: Requests sent.
        answered: Whole answers, equal to those of the idle server.
        left: Requests whose client left.
        wrong: Answers that differ from those of the idle server.
        lost: Requests without a whole answer whose client stayed, or with an error.
        twice: Answers that ended more than once, or had too many tokens.
        still_open: Requests that the server still had in hand when all clients were done.
        seconds: That it took.
        resident_bytes: Medians of the memory of all processes, in the four quarters of the time.
    """

    asked: int
    answered: int
    left: int
    wrong: int
    lost: int
    twice: int
    still_open: int
    seconds: float
    resident_bytes: tuple[float, ...]

    @property
    def growth(self) -> float:
        """Memory in the last quarter over that in the second: the first one fills caches."""
        return self.resident_bytes[3] / self.resident_bytes[1]

    def check(self) -> None:
        """Fail if anything is wrong."""
        assert self.asked == self.answered + self.left, self
        assert (self.wrong, self.lost, self.twice, self.still_open) == (0, 0, 0, 0), self
        assert self.growth < 1.05, f"memory has grown by {self.growth - 1:.1%}"


def soak(served: Served, *, clients: int, seconds: float, seed: int = 0) -> Soak:
    """Ask for some time.

    Args:
        served: The server, which must be ``--batch-invariant``.
        clients: That ask at the same time.
        seconds: Nothing new is asked after that.
        seed: Of what is asked and who leaves.
    """
    kinds = [
        Wish(resolution_px=px, new_tokens=length, seed=number, temperature=1.0)
        for number, (px, length) in enumerate((p, n) for p in _SIZES_PX for n in _LENGTHS)
    ]
    return asyncio.run(_soak(served, kinds, clients, seconds, random.Random(seed)))


async def _soak(
    served: Served, kinds: Sequence[Wish], clients: int, seconds: float, chance: random.Random
) -> Soak:
    bodies = [kind.body() for kind in kinds]
    expected = [(await ask(served.address, body)).text for body in bodies]
    counts: Counter[str] = Counter()
    memory: list[int] = []
    start = time.perf_counter()

    async def client(chance: random.Random) -> None:
        while time.perf_counter() - start < seconds:
            number = chance.randrange(len(bodies))
            leaves = chance.random() < 0.2
            after = chance.randint(1, kinds[number].new_tokens - 1) if leaves else None
            counts["asked"] += 1
            answer = await ask(served.address, bodies[number], leave_after=after)
            tokens, wanted = len(answer.token_s), kinds[number].new_tokens
            if answer.ends > 1 or tokens > wanted:
                counts["twice"] += 1
            elif answer.problem is not None or (
                not leaves and (not answer.ends or tokens < wanted)
            ):
                counts["lost"] += 1
            elif leaves:
                counts["left"] += 1
            else:
                counts["answered" if answer.text == expected[number] else "wrong"] += 1

    async def watch() -> None:
        while True:
            memory.append(served.resident_bytes())
            await asyncio.sleep(max(0.05, seconds / 200))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(random.Random(chance.random())) for _ in range(clients)))
    watching.cancel()
    took = time.perf_counter() - start
    quarter = len(memory) // 4
    parts = [memory[number * quarter : (number + 1) * quarter] for number in range(4)]
    return Soak(
        **{name: counts[name] for name in ("asked", "answered", "left", "wrong", "lost", "twice")},
        still_open=await _still_open(served),
        seconds=took,
        resident_bytes=tuple(float(statistics.median(part)) for part in parts),
    )


async def _still_open(served: Served) -> int:
    """Requests in hand, once there was time to notice that clients have left."""
    url = served.address.removesuffix("/v1") + "/metrics"
    end = time.monotonic() + _SETTLE_S
    while True:
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
        names = ("cascadevl_open_requests", "cascadevl_engine_running", "cascadevl_engine_waiting")
        number = int(sum(float(values[name]) for name in names))
        if not number or time.monotonic() > end:
            return number
        await asyncio.sleep(0.2)


def told(found: Soak) -> str:
    """For people."""
    values = asdict(found)
    memory = ", ".join(f"{each / 2**20:.0f}" for each in values.pop("resident_bytes"))
    facts = ", ".join(f"{name} {value:g}" for name, value in values.items())
    return f"{facts}; memory in quarters of the time, MiB: {memory} ({found.growth - 1:+.1%})"
