"""What the processes of a decoupled server say to each other, and how it stands on the wire.

A message is msgpack, followed by frames of raw bytes: pixels, token ids, and visual features in the
model's own type (BF16 of a BF16 model). Nothing is pickled. The places are private: whoever can
reach them can ask and answer, so they belong into a network of their own.

    front -> vision      Encode (pixels), Drop, Gone
    vision -> front      Hello, Beat, Broken
    vision -> language   Open, Features (bits), Pulse
    language -> vision   Credit, Pulse, Who
    front -> language    Ask (ids), Drop
    language -> front    Hello, Beat, Accepted, Received, Said, Refused
    front -> either      Pulse, Who
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import torch
import zmq
import zmq.asyncio
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cascadevl.engine.requests import Completion, EngineStats, TokenOutput
from cascadevl.engine.sampling import SamplingParams
from cascadevl.errors import (
    CascadeVLError,
    LogitsError,
    RequestError,
    ServerError,
    UnavailableError,
)
from cascadevl.model.routing import Thresholds

Role: TypeAlias = Literal["vision", "language"]

Fault: TypeAlias = Literal["request", "server", "moment"]
"""Whose fault a failure is: the request's own, the server's, or only that of the moment."""

_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Any message."""


class Hello(_Message, frozen=True):
    """A server joins: what it is, where it takes features, and which weights it has."""

    role: Role
    features_at: str
    weights: str


class Beat(_Message, frozen=True):
    """A server is alive, and has done so much."""

    stats: EngineStats


class Pulse(_Message, frozen=True):
    """Nothing but a number, by which the other side sees whether messages were lost before."""


class Who(_Message, frozen=True):
    """The other side is not known, or what it said was lost: it is to begin anew."""


class Ask(_Message, frozen=True):
    """A request; its token ids follow as a frame, one slot a picture."""

    request: int
    tiles_per_image: tuple[int, ...]
    sampling: SamplingParams
    num_samples: int
    increments: tuple[float, ...] | float | None
    stream: bool
    thinking_budget: int | None = None


class Accepted(_Message, frozen=True):
    """The language server waits for the features of a request."""

    request: int


class Encode(_Message, frozen=True):
    """Tiles of a request, whose pixels follow as a frame; features go to a language server.

    Attributes:
        request: Its number.
        server: Who gets the features.
        features_at: Where that takes them.
        keys: Of the tiles.
        shape: Of the pixels.
        tokens_per_tile: Visual tokens of each tile, if that is decided.
        budget: What the router of the vision server decides by otherwise: the share of the tiles
            that stays full, or thresholds.
    """

    request: int
    server: str
    features_at: str
    keys: tuple[bytes, ...]
    shape: tuple[int, int, int, int]
    tokens_per_tile: tuple[int, ...] = ()
    budget: float | Thresholds | None = None


class Open(_Message, frozen=True):
    """A vision server asks a language server for credit."""


class Credit(_Message, frozen=True):
    """So many more bytes of features may be sent."""

    num_bytes: int


class Features(_Message, frozen=True):
    """The visual tokens of all tiles of a request; their bits follow as a frame.

    Attributes:
        request: Its number.
        dtype: Type of the numbers.
        tokens_per_tile: Visual tokens of each tile: a router gives them different ones.
        width: Numbers of a visual token.
    """

    request: int
    dtype: str
    tokens_per_tile: tuple[int, ...]
    width: int


class Received(_Message, frozen=True):
    """The language server has the features of a request."""

    request: int


class Said(_Message, frozen=True):
    """What steps of the engine brought."""

    tokens: tuple[TokenOutput, ...]
    completions: tuple[Completion, ...]


class Refused(_Message, frozen=True):
    """A request will not be answered; ``why`` says whose fault that is."""

    request: int
    problem: str
    why: Fault

    def error(self) -> CascadeVLError:
        """What whoever asked is told."""
        kinds = {"request": RequestError, "server": ServerError, "moment": UnavailableError}
        return kinds[self.why](self.problem)


def fault_of(error: CascadeVLError) -> Fault:
    """Whose fault a failure is.

    Args:
        error: Why a request cannot be answered.
    """
    if isinstance(error, UnavailableError):
        return "moment"
    return "server" if isinstance(error, ServerError | LogitsError) else "request"


class Drop(_Message, frozen=True):
    """A request was called off, or belongs to somebody else by now."""

    request: int


class Gone(_Message, frozen=True):
    """A language server is gone."""

    server: str


class Broken(_Message, frozen=True):
    """The way to a language server has lost something; what was to go there is forgotten."""

    server: str


Message: TypeAlias = (
    Hello
    | Beat
    | Pulse
    | Who
    | Ask
    | Accepted
    | Encode
    | Open
    | Credit
    | Features
    | Received
    | Said
    | Refused
    | Drop
    | Gone
    | Broken
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message that has arrived, with its frames.

    Attributes:
        sender: Whose it is, on a socket that has several peers.
        message: The message.
        frames: What followed it.
        is_torn: Whether messages before it were lost: the connection was cut meanwhile.
    """

    sender: bytes
    message: Message
    frames: tuple[memoryview, ...]
    is_torn: bool = False


class Link:
    """One socket: messages in, messages out.

    Nothing is ever dropped for want of room in a queue; what may be under way is bounded by the
    credit of features and the number of requests in hand. What a cut connection loses is noticed,
    because messages are numbered.
    """

    def __init__(self, context: zmq.Context[Any], *, name: str | None = None) -> None:
        """Make a socket: of one peer, or of many.

        Args:
            context: Makes sockets; those of one process share it (``inproc://``).
            name: By which the peer knows this side; None for the side that has many peers.
        """
        self.has_many = name is None
        self._sent: dict[bytes, int] = {}  # messages to each peer
        self._received: dict[bytes, int] = {}  # the number of the last one from each
        shadow = zmq.asyncio.Context.shadow(context)
        self._socket = shadow.socket(zmq.ROUTER if name is None else zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5000)
        # Linux asks an address that does not answer ever less often, at last once in a minute.
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
        if name is None:
            self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        else:
            self._socket.setsockopt(zmq.ROUTING_ID, name.encode())

    def bind(self, address: str) -> str:
        """Take messages at an address.

        Args:
            address: ``tcp://``, ``ipc://`` or ``inproc://``; port 0 for any that is free.

        Returns:
            The address, with the port that was found.

        Raises:
            ServerError: If it cannot be had.
        """
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise ServerError(f"cannot listen at {address}: {error}") from error
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def connect(self, address: str) -> None:
        """Send messages to an address, now or once somebody is there."""
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            raise ServerError(f"cannot connect to {address}: {error}") from error

    async def send(self, message: Message, *frames: bytes | memoryview, to: bytes = b"") -> None:
        """Send a message; to a peer that is gone, it is lost.

        Args:
            message: The message.
            *frames: What follows it.
            to: Which peer, where there are many.
        """
        number = self._sent[to] = self._sent.get(to, 0) + 1
        parts = [number.to_bytes(8, "big"), _ENCODER.encode(message), *frames]
        if self.has_many:
            parts.insert(0, to)
        await self._socket.send_multipart(parts, copy=False)

    async def receive(self) -> Parcel:
        """The next message.

        Raises:
            ServerError: If it is none: somebody else talks here.
        """
        parts = await self._socket.recv_multipart(copy=False)
        sender = parts.pop(0).bytes if self.has_many else b""
        if len(parts) < 2:
            raise ServerError("a message without content has come; who talks here?")
        try:
            message = _DECODER.decode(parts[1].buffer)
        except msgspec.DecodeError as error:
            raise ServerError(f"a message cannot be read ({error}); who talks here?") from error
        number = int.from_bytes(parts[0].bytes, "big")
        is_torn = number != self._received.get(sender, 0) + 1
        self._received[sender] = number
        return Parcel(sender, message, tuple(part.buffer for part in parts[2:]), is_torn)

    def close(self) -> None:
        """Send and receive nothing more."""
        self._socket.close(linger=0)


def bits_of(features: Sequence[Float[Tensor, "_ hidden"]]) -> memoryview:
    """The bits of features, one tile after the other.

    Args:
        features: The visual tokens of each.
    """
    joined = torch.cat(list(features)).cpu().contiguous()
    return joined.view(torch.uint8).numpy().data.cast("B")


def features_of(message: Features, bits: memoryview) -> list[Float[Tensor, "_ hidden"]]:
    """The visual tokens of each tile from their bits.

    Raises:
        ServerError: If there are not as many bits as the message says.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise ServerError(f"features of type {message.dtype!r} have come, which is not known")
    num_tokens = sum(message.tokens_per_tile)
    wanted = num_tokens * message.width * dtype.itemsize
    if not wanted or len(bits) != wanted:
        raise ServerError(
            f"{len(bits)} bytes of features have come, but {num_tokens} visual tokens of "
            f"{message.width} numbers in {message.dtype} are {wanted}"
        )
    own = bytearray(bits)  # the frame belongs to ZeroMQ and may not be written
    joined = torch.frombuffer(own, dtype=dtype).view(num_tokens, message.width)
    return list(joined.split(list(message.tokens_per_tile)))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type on the wire."""
    return str(dtype).removeprefix("torch.")


def pixels_of(message: Encode, content: memoryview) -> UInt8[np.ndarray, "tiles px px 3"]:
    """Tiles from their pixels.

    Raises:
        ServerError: If there are not as many as the message says.
    """
    if len(content) != int(np.prod(message.shape)) or len(message.keys) != message.shape[0]:
        raise ServerError(
            f"{len(content)} pixels for {len(message.keys)} tiles have come, but {message.shape} "
            f"were announced"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(message.shape)


def ids_of(content: memoryview) -> Int[np.ndarray, " tokens"]:
    """Token ids from their frame."""
    return np.frombuffer(content, dtype=np.int64)
