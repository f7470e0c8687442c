import assert from 'node:assert/strict'

import fc from 'fast-check'

import type { Choice } from '../../lib/allocate/allocate'
import { allocate } from '../../lib/allocate/allocate'

/** Every way to choose. */
function* selections(pieces: readonly (readonly Choice[])[]): Generator<number[]> {
  const [first, ...rest] = pieces
  if (first === undefined) yield []
  else for (const index of first.keys()) for (const others of selections(rest)) yield [index, ...others]
}

const sum = (pieces: readonly (readonly Choice[])[], taken: readonly number[], of: keyof Choice): number =>
  taken.reduce((total, index, piece) => total + pieces[piece]![index]![of], 0)

describe('allocate', () => {
  it('finds what trying everything finds', () => {
    const choice = fc.record({ cost: fc.integer({ min: 1, max: 9 }).map((units) => 64 * units), loss: fc.integer({ min: -3, max: 50 }) })
    const pieces = fc.array(fc.array(choice, { minLength: 1, maxLength: 4 }), { minLength: 1, maxLength: 5 })
    fc.assert(fc.property(pieces, fc.integer({ min: 1, max: 3000 }), (given, budget) => {
      const all = [...selections(given)].filter((taken) => sum(given, taken, 'cost') <= budget)
      if (all.length === 0) {
        assert.throws(() => allocate(given, budget), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
        return
      }
      const taken = allocate(given, budget)
      assert.ok(sum(given, taken, 'cost') <= budget)
      const least = Math.min(...all.map((one) => sum(given, one, 'loss')))
      assert.equal(sum(given, taken, 'loss'), least)
      const cheapest = Math.min(...all.filter((one) => sum(given, one, 'loss') === least).map((one) => sum(given, one, 'cost')))
      assert.equal(sum(given, taken, 'cost'), cheapest)
    }), { numRuns: 300 })
  })

  it('spends a budget to the last unit where that helps, and not a unit more', () => {
    const piece = [{ cost: 512, loss: 4 }, { cost: 768, loss: 1 }, { cost: 1024, loss: 0 }]
    assert.deepEqual(allocate([piece, piece], 1280).sort(), [0, 1])
    assert.deepEqual(allocate([piece, piece], 1279), [0, 0])
    assert.deepEqual(allocate([piece, piece], 1e6), [2, 2])
  })
})
