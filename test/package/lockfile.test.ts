import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'

const root = resolve(__dirname, '../..')
const json = (name: string): unknown => JSON.parse(readFileSync(join(root, name), 'utf8'))

describe('package-lock.json', () => {
  const { packages } = json('package-lock.json') as { packages: Record<string, Record<string, unknown>> }

  it('names no registry', () => {
    assert.deepEqual(Object.keys(packages).filter((name) => packages[name]?.resolved !== undefined), [])
  })

  it('agrees with package.json', () => {
    const manifest = json('package.json') as Record<string, unknown>
    for (const key of ['name', 'version', 'bin', 'engines', 'dependencies', 'devDependencies', 'peerDependencies', 'peerDependenciesMeta']) {
      assert.deepEqual(packages['']?.[key], manifest[key], key)
    }
  })
})
