"""Writes the gradients of a Hugging Face model's keys and values for `couplet calibrate --weights fisher --gradients FILE` (gradients.md).

Needs torch, transformers and safetensors. Gradients are kept as float16 times --scale: tokens * layers * 2 * kv heads * head dim * 2 bytes.
"""
import argparse
import hashlib
import struct

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

options = argparse.ArgumentParser()
options.add_argument("--model", required=True)
options.add_argument("--text", required=True)
options.add_argument("--length", type=int, default=512, help="tokens of a chunk, as given to couplet")
options.add_argument("--scale", type=float, default=64.0, help="factor that keeps small gradients above float16's least")
options.add_argument("--out", required=True)
options = options.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device).eval()
model.requires_grad_(False)
head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
text = open(options.text, encoding="utf-8").read()
tokens = AutoTokenizer.from_pretrained(options.model)(text, add_special_tokens=False)["input_ids"]

gradients = {}  # name -> pieces [chunk tokens, kv heads, head dim]


def record(name):
    def keep(gradient):
        if gradient.dim() == 4 and gradient.shape[1] != chunk.shape[1]:  # a norm after the heads were brought to the front
            gradient = gradient.transpose(1, 2)
        piece = gradient.detach().reshape(chunk.shape[1], -1, head_dim) * options.scale
        gradients.setdefault(name, []).append(piece.to(torch.float16).cpu())

    def forward(module, inputs, output):
        if not output.requires_grad:  # nothing before the first layer's keys wants a gradient
            output.requires_grad_()
        output.register_hook(keep)

    return forward


for i, layer in enumerate(model.model.layers):
    attention = layer.self_attn
    # Keys as they enter the rotary embedding: after their norm, where there is one.
    (getattr(attention, "k_norm", None) or attention.k_proj).register_forward_hook(record(f"layers.{i}.key"))
    attention.v_proj.register_forward_hook(record(f"layers.{i}.value"))

for start in range(0, len(tokens), options.length):
    chunk = torch.tensor([tokens[start : start + options.length]], device=device)
    with torch.enable_grad():
        logits = model(chunk, use_cache=False).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits[:-1], chunk[0, 1:], reduction="sum")
    loss.backward()
    print(f"{start + chunk.shape[1]} of {len(tokens)} tokens, loss {loss.item() / max(1, chunk.shape[1] - 1):.4f}", flush=True)

metadata = {
    "format": "couplet.gradients",
    "text": hashlib.sha256(struct.pack(f"<{len(tokens)}I", *tokens)).hexdigest(),
    "length": str(options.length),
}
save_file({name: torch.cat(pieces) for name, pieces in gradients.items()}, options.out, metadata)
