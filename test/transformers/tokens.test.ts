import assert from 'node:assert/strict'
import fc from 'fast-check'
import { TokenList } from '../../lib/transformers/tokens'

describe('TokenList', () => {
  it('holds what was appended, however lists branch off one another', () => {
    const step = fc.record({ from: fc.nat(), prefix: fc.nat(), ids: fc.array(fc.nat(3), { maxLength: 100 }) })
    fc.assert(fc.property(fc.array(step, { maxLength: 30 }), (steps) => {
      const lists = [TokenList.of()]
      const plain: number[][] = [[]]
      for (const { from, prefix, ids } of steps) {
        const source = from % lists.length
        const kept = prefix % (plain[source]!.length + 1)
        lists.push(lists[source]!.prefix(kept).append(ids))
        plain.push([...plain[source]!.slice(0, kept), ...ids])
        for (const [index, list] of lists.entries()) assert.deepEqual([...list.view(0)], plain[index])
      }
      for (const [i, a] of lists.entries()) {
        for (const [j, b] of lists.entries()) {
          let common = 0
          while (common < plain[i]!.length && common < plain[j]!.length && plain[i]![common] === plain[j]![common]) common += 1
          // Lists that share storage may only ever be compared up to the shorter one: they agree that far.
          assert.equal(a.commonPrefix(b), common)
        }
      }
    }))
  })

  it('shares storage while a text grows at its end', () => {
    let list = TokenList.of([1, 2, 3])
    for (let id = 0; id < 1000; id += 1) {
      const longer = list.append([id])
      assert.equal(longer.commonPrefix(list), list.length)
      list = longer
    }
    assert.equal(list.view(0).buffer.byteLength, list.append([]).view(0).buffer.byteLength)
    assert.ok(list.view(0).buffer.byteLength < 4 * 4 * list.length)
  })
})
