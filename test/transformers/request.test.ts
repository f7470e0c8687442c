import assert from 'node:assert/strict'
import { readRequest, spreadLogits } from '../../lib/transformers/request'
import { TokenList } from '../../lib/transformers/tokens'
import type { OrtTensor } from '../../lib/transformers/types'

const int64 = (values: number[], dims: number[]): OrtTensor => ({ type: 'int64', data: BigInt64Array.from(values.map(BigInt)), dims, location: 'cpu' })

describe('reading the feeds of a decoder step', () => {
  it('leaves padding out, wherever it stands', () => {
    const request = readRequest({
      input_ids: int64([0, 0, 5, 6, 7, 8, 9, 0], [2, 4]),
      attention_mask: int64([0, 0, 1, 1, 1, 1, 1, 0], [2, 4]),
    }, undefined)
    assert.deepEqual(request.rows.map(({ text }) => [...text.view(0)]), [[5, 6], [7, 8, 9]])
    assert.deepEqual(request.rows.map(({ wanted }) => wanted), [2, 3])
    // Logits [2 rows][3 columns][1]: row 0 is aligned at the end.
    const logits = spreadLogits(request, [0, 1], Float32Array.of(-1, 50, 60, 70, 80, 90), 3, 1)
    assert.deepEqual([...logits], [0, 0, 50, 60, 70, 80, 90, 0])
  })

  it('continues the texts of the past', () => {
    const past = { texts: [TokenList.of([5, 6]), TokenList.of([1, 2, 3, 4])], columns: 4 }
    const request = readRequest({
      input_ids: int64([7, 8], [2, 1]),
      attention_mask: int64([0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [2, 5]),
      position_ids: int64([2, 4], [2, 1]),
      num_logits_to_keep: int64([1], []),
    }, past)
    assert.deepEqual(request.rows.map(({ text, fresh, wanted }) => [[...text.view(0)], fresh, wanted]), [[[5, 6, 7], 1, 1], [[1, 2, 3, 4, 8], 1, 1]])
  })

  it('asks for logits of the last tokens only when told to', () => {
    const feeds = { input_ids: int64([1, 2, 3], [1, 3]) }
    assert.equal(readRequest(feeds, undefined).logitColumns, 3)
    assert.equal(readRequest({ ...feeds, num_logits_to_keep: int64([0], []) }, undefined).logitColumns, 3)
    assert.equal(readRequest({ ...feeds, num_logits_to_keep: int64([2], []) }, undefined).rows[0]?.wanted, 2)
  })

  it('passes logits on as they are when nothing is padded', () => {
    const request = readRequest({ input_ids: int64([1, 2], [2, 1]) }, undefined)
    const logits = Float32Array.of(1, 2, 3, 4)
    assert.equal(spreadLogits(request, [0, 1], logits, 1, 2), logits)
  })

  it('refuses feeds that do not fit, with a sentence', () => {
    const ids = int64([1, 2], [1, 2])
    const past = { texts: [TokenList.of([9])], columns: 1 }
    const cases: [Record<string, OrtTensor>, typeof past | undefined, RegExp][] = [
      [{}, undefined, /int64 tensor \[batch, tokens\] for `input_ids` but received nothing/],
      [{ input_ids: { ...ids, data: new Float32Array(2), type: 'float32' } }, undefined, /int64 tensor for `input_ids` but received float32 \[1, 2\]/],
      [{ input_ids: int64([1, 2], [2, 1]) }, past, /1 rows, as past_key_values has/],
      [{ input_ids: ids, attention_mask: int64([1, 1], [1, 2]) }, past, /int64 tensor \[1, 3\] for `attention_mask`/],
      [{ input_ids: ids, attention_mask: int64([0, 1, 1], [1, 3]) }, past, /1 ones over the past of row 0/],
      [{ input_ids: ids, attention_mask: int64([1, 0], [1, 2]), num_logits_to_keep: int64([1], []) }, undefined, /padding_side = "left"/],
      [{ input_ids: ids, position_ids: int64([4, 5], [1, 2]) }, undefined, /consecutive positions from 0/],
      [{ input_ids: ids, position_ids: int64([0, 2], [1, 2]) }, undefined, /consecutive positions from 0/],
    ]
    for (const [feeds, before, message] of cases) assert.throws(() => readRequest(feeds, before), message)
  })
})
