"""Joins what couplet_bench_cuda and peer.py wrote into one JSON document and one table in markdown.

    report.py BENCH.json PEER.json OUT.json OUT.md --command TEXT --driver TEXT

PEER.json may be missing (no PyTorch): rows then have no peer. couplet speed-up = peer's fastest median / our median.
"""
import argparse
import datetime
import json
import os

SHAPE = ('batch', 'context', 'queries', 'queryHeads', 'kvHeads', 'headDim')


def fastest_peers(peer):
    best = {}
    for row in peer['rows']:
        key = tuple(row[name] for name in SHAPE)
        if 'microseconds' in row and row['microseconds'] < best.get(key, row)['microseconds'] + 1e-9:
            best[key] = row
    return best


def add_peers(rows, peer):
    best = fastest_peers(peer)
    for row in rows:
        found = best.get(tuple(row[name] for name in SHAPE))
        if found and row['operation'].startswith('attend'):
            row['peer'] = {name: found[name] for name in ('backend', 'form', 'microseconds')}
            row['speedup'] = round(found['microseconds'] / row['microseconds'], 3)


def percent(share):
    return f'{100 * share:.0f} %' if share else ''


def table(document):
    device, ceilings = document['device'], document['ceilings']
    yield f"{device['name']}, driver {document['driver']}, CUDA {device['cudaRuntime'] // 1000}.{device['cudaRuntime'] % 1000 // 10}, {document['date']}."
    yield (f"Copy {ceilings['copyBytesPerSecond'] * 1e-9:.0f} GB/s; lookups in shared memory {ceilings['lookupBytesPerSecond'] * 1e-12:.1f} TB/s"
           f" (with conflicts {ceilings['conflictingLookupBytesPerSecond'] * 1e-12:.1f} TB/s).")
    for row in document['failures']:
        yield f"WRONG, and without a row: {json.dumps(row)}"
    yield ''
    yield '| operation | codec | batch x context | query / kv heads x headDim | us | MB | of copy | of lookups | x peer | body |'
    yield '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |'
    for row in document['rows']:
        peer = f"{row['speedup']:.2f} ({row['peer']['backend']} {row['peer']['microseconds']:.0f} us)" if 'peer' in row else ''
        note = f"; {row['note']}" if row['note'] else ''
        yield (f"| {row['operation']} | {row['codec']} | {row['batch']} x {row['context']} | {row['queryHeads']} / {row['kvHeads']} x {row['headDim']}"
               f" | {row['microseconds']:.1f} | {row['bytes'] * 1e-6:.1f} | {percent(row['shareOfCopy'])} | {percent(row['shareOfLookups'])} | {peer} | {row['body']}{note} |")


def main():
    parser = argparse.ArgumentParser()
    for name in ('bench', 'peer', 'json', 'markdown'):
        parser.add_argument(name)
    parser.add_argument('--command', default='')
    parser.add_argument('--driver', default='unknown')
    flags = parser.parse_args()
    with open(flags.bench) as file:
        document = json.load(file)
    rows = document.pop('rows')
    document.update(date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%dT%H:%M:%SZ'), driver=flags.driver, command=flags.command)
    if os.path.exists(flags.peer):
        with open(flags.peer) as file:
            peer = json.load(file)
        add_peers(rows, peer)
        document['peer'] = peer
    document['rows'] = rows
    # A row a line, so that two results can be compared by diff.
    head = json.dumps({name: value for name, value in document.items() if name not in ('rows', 'peer')}, indent=1)[:-2]
    lines = lambda items: '[\n' + ',\n'.join(json.dumps(item) for item in items) + '\n]'
    peers = f",\n\"peer\": {{\"torch\": {json.dumps(peer['torch'])}, \"cudnn\": {peer['cudnn']}, \"rows\": {lines(peer['rows'])}}}" if 'peer' in document else ''
    with open(flags.json, 'w') as file:
        file.write(f'{head}{peers},\n"rows": {lines(rows)}\n}}\n')
    with open(flags.markdown, 'w') as file:
        file.write('\n'.join(table(document)) + '\n')


main()
