"""The peer of ``serve_load.py``: diffusers behind FastAPI, as its own example has it, one picture at a time.

Source of the form: https://huggingface.co/docs/diffusers/using-diffusers/create_a_server.

    python benchmarks/serve_diffusers.py zimg-tiny-z
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import sys
from io import BytesIO
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel

from zimgkit.runtime import demo_models


class Body(BaseModel):
    """What is asked for."""

    prompt: str
    seed: int = 0
    num_inference_steps: int = 8


def main() -> None:
    """The script."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0)))
    checkpoint = demo_models.locate(sys.argv[1])
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    app, one_at_a_time = FastAPI(), asyncio.Lock()

    def draw(body: Body) -> str:
        generator, data = torch.Generator().manual_seed(body.seed), BytesIO()
        side = {"height": 128, "width": 128}
        scale = {"guidance_scale": 0.5}
        picture: Any = pipeline(
            body.prompt,
            negative_prompt="",
            num_inference_steps=body.num_inference_steps,
            generator=generator,
            **side,
            **scale,
        )
        picture.images[0].save(data, "PNG")
        return base64.b64encode(data.getvalue()).decode()

    @app.post("/v1/images/generations")
    async def generate(body: Body) -> dict[str, Any]:
        async with one_at_a_time:
            return {"data": [{"b64_json": await asyncio.to_thread(draw, body)}]}

    draw(Body(prompt="a red circle"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"ready: http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="error")
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
