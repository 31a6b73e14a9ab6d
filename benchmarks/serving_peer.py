"""A plain transformers server, for bench_serving.py to compare with.

`InternVLForConditionalGeneration.generate` behind Python's own HTTP server: requests are answered
one after the other, in the order in which they come, and their tokens streamed as they are drawn.
Pictures and text are prepared by our processor, because transformers' needs torchvision; that is
done in the thread of each request, beside the model.

Run: ``python benchmarks/serving_peer.py CHECKPOINT --threads 2``
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from serving_client import NAME
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from cascadevl.host_memory import keep_freed_memory
from cascadevl.model.part import load_settings


class _Writer(BaseStreamer):
    """Writes an event for every token, as our server does where log-probabilities are asked for."""

    def __init__(self, send: Any, tokenizer: Any) -> None:
        self.send, self.tokenizer = send, tokenizer
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, then a token at a time."""
        if self.is_prompt:
            self.is_prompt = False
            return
        text = self.tokenizer.decode(value.tolist(), skip_special_tokens=True)
        self.send({"delta": {"content": text}, "logprobs": {"content": []}, "finish_reason": None})

    def end(self) -> None:
        """Say that the answer has ended."""
        self.send({"delta": {}, "logprobs": None, "finish_reason": "length"})


class Peer:
    """The model, its processor, and the one answer that is made at a time."""

    def __init__(self, checkpoint: str) -> None:
        """Open a checkpoint in plain transformers."""
        self.processor = load_settings(checkpoint)[1]
        self.model = InternVLForConditionalGeneration.from_pretrained(
            checkpoint, local_files_only=True, dtype="auto"
        ).eval()
        self.turn = threading.Lock()

    @torch.inference_mode()
    def answer(self, body: dict[str, Any], send: Any) -> int:
        """Answer a request; gives the number of its prompt's tokens."""
        inputs = self.processor.apply_chat_template(
            body["messages"],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with self.turn:
            self.model.generate(
                **inputs,
                max_new_tokens=body["max_tokens"],
                min_new_tokens=body["max_tokens"],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=_Writer(send, self.processor.tokenizer),
            )
        return int(inputs["input_ids"].shape[1])


def handler_of(peer: Peer) -> type[BaseHTTPRequestHandler]:
    """What answers HTTP requests."""

    class Handler(BaseHTTPRequestHandler):
        """Streams answers as OpenAI's API does."""

        def do_GET(self) -> None:
            """Say that requests are taken."""
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            """Answer."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            tokens = peer.answer(body, lambda choice: self._send({"choices": [choice]}))
            self._send({"choices": [], "usage": {"prompt_tokens": tokens}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, event: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


class Server(ThreadingHTTPServer):
    """Takes as many connections as come at once."""

    request_queue_size = 1024


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    server = Server(("127.0.0.1", 0), handler_of(Peer(arguments.checkpoint)))
    print(f"{NAME} at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
