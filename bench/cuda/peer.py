"""PyTorch's scaled_dot_product_attention in float16 at the shapes of couplet_bench_cuda: the peer of its attend rows.

Every backend (flash, cuDNN, memory-efficient) in both forms, query heads that share a kv head as such (enable_gqa) and as query rows of
their kv head (no mask is needed for one query; a prefill's 512 queries go without theirs, 2 to 6 % more than they would have to do). A
prompt that nothing comes before has its causal mask, and query heads as such.
Keys and values are contiguous, [batch][kv head][token][channel]. A sample is L2 read full of something else, an event, the call, an
event, as in measure.cu; the median counts. One JSON document goes to the file given.

    peer.py OUT.json [--shapes 16x30720,...] [--heads 1,4,8] [--head-dims 64,128] [--prefills 1x8192,...] [--prompts 1x2048,...]
                     [--seconds 0.1]
"""
import argparse
import json
import statistics
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KV_HEADS = 8
BACKENDS = {'flash': SDPBackend.FLASH_ATTENTION, 'cudnn': SDPBackend.CUDNN_ATTENTION, 'efficient': SDPBackend.EFFICIENT_ATTENTION}


def numbers(text):
    return [int(part) for part in text.split(',') if part]


def shapes(text):
    return [tuple(int(part) for part in shape.split('x')) for shape in text.split(',') if shape]


class Meter:
    def __init__(self, seconds):
        self.seconds = seconds
        self.flush = torch.ones(64 << 20, dtype=torch.int32, device='cuda')
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def microseconds(self, call):
        for _ in range(2):
            call()
        samples = []
        while len(samples) < 5 or (sum(samples) < 1e6 * self.seconds and len(samples) < 100):
            self.flush.sum()
            self.events[0].record()
            call()
            self.events[1].record()
            torch.cuda.synchronize()
            samples.append(1e3 * self.events[0].elapsed_time(self.events[1]))
        return statistics.median(samples), len(samples)


def forms_of(queries, group_heads):
    """The query tensor as each form wants it: [batch][query head][query][channel] and [batch][kv head][rows][channel]."""
    batch, heads, tokens, channels = queries.shape
    forms = {'heads': (queries, {'enable_gqa': True} if group_heads > 1 else {})}
    if group_heads > 1:
        forms['rows'] = (queries.reshape(batch, KV_HEADS, group_heads * tokens, channels), {})
    return forms


def measure(meter, keys, values, batch, context, queries, group_heads, head_dim):
    count = batch * KV_HEADS * context * head_dim
    key = keys[:count].view(batch, KV_HEADS, context, head_dim)
    value = values[:count].view(batch, KV_HEADS, context, head_dim)
    query = torch.randn(batch, KV_HEADS * group_heads, queries, head_dim, device='cuda', dtype=torch.float16)
    forms = forms_of(query, group_heads)
    if queries == context:
        rows, options = forms['heads']
        forms = {'heads': (rows, {**options, 'is_causal': True})}
    for form, (rows, options) in forms.items():
        for name, backend in BACKENDS.items():
            row = {'batch': batch, 'context': context, 'queries': queries, 'queryHeads': KV_HEADS * group_heads, 'kvHeads': KV_HEADS,
                   'headDim': head_dim, 'backend': name, 'form': form}
            try:
                with sdpa_kernel(backend):
                    time, samples = meter.microseconds(lambda: F.scaled_dot_product_attention(rows, key, value, **options))
                yield {**row, 'microseconds': round(time, 3), 'samples': samples}
            except RuntimeError as error:  # a backend that cannot do this form says so
                yield {**row, 'refused': str(error).split('\n')[0][:120]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('out')
    parser.add_argument('--shapes', type=shapes, default=shapes('16x30720,32x61440,64x30720,1x131072,8x8192'))
    parser.add_argument('--heads', type=numbers, default=[1, 4, 8])
    parser.add_argument('--head-dims', type=numbers, default=[64, 128])
    parser.add_argument('--prefills', type=shapes, default=shapes('1x8192,8x8192,1x30720'))
    parser.add_argument('--prompts', type=shapes, default=shapes('1x2048,8x2048'))
    parser.add_argument('--seconds', type=float, default=0.1)
    flags = parser.parse_args()
    warnings.filterwarnings('ignore')  # each backend says at length why it refuses a form
    torch.manual_seed(0)
    meter = Meter(flags.seconds)
    most = max(batch * context for batch, context in flags.shapes + flags.prefills + flags.prompts) * KV_HEADS * max(flags.head_dims)
    keys, values = (torch.randn(most, device='cuda', dtype=torch.float16) for _ in range(2))
    half = most // 2
    copy_us, _ = meter.microseconds(lambda: values[:half].copy_(keys[:half]))
    print(f'peer copy {4 * half / copy_us * 1e-3:.0f} GB/s', flush=True)
    rows = []
    for head_dim in flags.head_dims:
        cases = [(*shape, 1, heads) for shape in flags.shapes for heads in flags.heads]
        cases += [(*shape, 512, 4) for shape in flags.prefills] + [(*shape, shape[1], 4) for shape in flags.prompts]
        for batch, context, queries, heads in cases:
            found = list(measure(meter, keys, values, batch, context, queries, heads, head_dim))
            rows += found
            best = min((row for row in found if 'microseconds' in row), key=lambda row: row['microseconds'], default=None)
            text = f"{best['microseconds']:.1f} us by {best['backend']} ({best['form']})" if best else 'no backend'
            print(f'peer {batch} x {context}, {queries} queries, heads {KV_HEADS * heads}/{KV_HEADS} x {head_dim}: {text}', flush=True)
    with open(flags.out, 'w') as file:
        json.dump({'torch': torch.__version__, 'cudnn': torch.backends.cudnn.version(), 'rows': rows}, file)


main()
