import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { root } from './setup'

// Examples import the package by its name, so they run on dist/, which `npm test` makes before.
const expected: Record<string, RegExp> = {
  'engine.mjs': /coded: 1020 tokens in \d+ KB\nlargest relative error of an attention output at 2 bits: 0\.\d+\n$/,
  'kmeans.mjs': /512 centroids of 32 problems in \d+ ms\n.* after \d+ iterations\n$/,
  // Three turns of 120 tokens; 25, 28 and 29 bytes are new, and the last token of a turn runs with the next one.
  'transformers.mjs': /-- 144 tokens run; 144 tokens in [^]*-- 148 tokens run; 292 tokens in [^]*-- 149 tokens run; 441 tokens in \d+ KB/,
}

describe('examples', function () {
  this.timeout(60_000)

  it('are all listed here', () => {
    // demo.mjs is `npm run demo`: minutes, not seconds.
    assert.deepEqual(readdirSync(join(root, 'examples')).sort(), ['demo.mjs', ...Object.keys(expected)].sort())
  })

  for (const [name, output] of Object.entries(expected)) {
    it(`${name} runs`, async () => {
      const { stdout } = await promisify(execFile)(process.execPath, [join('examples', name)], { cwd: root })
      assert.match(stdout, output)
    })
  }
})
