import assert from 'node:assert/strict'
import { Rotation } from '../../lib/transformers/rotation'

const shape = { heads: 2, tokens: 5, channels: 16 }
const rows = () => Float32Array.from({ length: 2 * 5 * 16 }, (_, index) => Math.sin(index * 1.7) * 3)

describe('Rotation', () => {
  for (const kind of ['half', 'interleaved'] as const) {
    it(`undoes what it applies (${kind})`, () => {
      const rotation = new Rotation({ kind, dim: 12, theta: 10000 }, 16)
      const data = rows()
      rotation.apply(data, shape, 1000)
      assert.notDeepEqual(data, rows())
      rotation.undo(data, shape, 1000)
      for (const [index, value] of rows().entries()) assert.ok(Math.abs(value - data[index]!) < 2e-6)
    })
  }

  it('turns pair i of token t by t * theta^(-2i / dim) and leaves other channels alone', () => {
    const rotation = new Rotation({ kind: 'half', dim: 4, theta: 100 }, 6)
    const data = Float32Array.of(1, 2, 3, 4, 5, 6)
    rotation.apply(data, { heads: 1, tokens: 1, channels: 6 }, 7)
    const expected = [1, 2, 3, 4, 5, 6]
    for (const [pair, angle] of [[0, 7], [1, 0.7]] as const) {
      const [x, y] = [pair + 1, pair + 3]
      expected[pair] = x * Math.cos(angle) - y * Math.sin(angle)
      expected[pair + 2] = y * Math.cos(angle) + x * Math.sin(angle)
    }
    for (const [index, value] of expected.entries()) assert.ok(Math.abs(value - data[index]!) < 1e-6)
  })

  it('undoes tables with an amplitude, and says when they end', () => {
    const angles = Array.from({ length: 8 * 2 }, (_, index) => index * 0.3)
    const cos = Float32Array.from(angles, (angle) => 1.3 * Math.cos(angle))
    const sin = Float32Array.from(angles, (angle) => 1.3 * Math.sin(angle))
    const rotation = new Rotation({ kind: 'half', dim: 4, cos, sin }, 16)
    const data = rows()
    rotation.apply(data, shape, 3)
    rotation.undo(data, shape, 3)
    for (const [index, value] of rows().entries()) assert.ok(Math.abs(value - data[index]!) < 2e-6)
    assert.throws(() => { rotation.apply(data, shape, 4) }, /tables of at least 9 positions for `rotary`/)
  })

  it('takes positions of padding as 0', () => {
    const rotation = new Rotation({ kind: 'half', theta: 10000 }, 16)
    const data = rows()
    rotation.apply(data, shape, -4)
    const expected = rows()
    assert.deepEqual(data.subarray(0, 5 * 16), expected.subarray(0, 5 * 16))
  })
})
