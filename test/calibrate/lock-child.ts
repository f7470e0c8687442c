// A process that uses a path as often as it is told, alone each time, or until it is ended.
//
//   node --import tsx lock-child.ts <path> <rounds, or 0: until it is ended>
import { rm, writeFile } from 'node:fs/promises'
import { setTimeout } from 'node:timers/promises'

import { codeOf } from '../../lib/errors'
import { whileLocked } from '../../lib/file-lock'

const [path, rounds] = [process.argv[2]!, Number(process.argv[3])]

async function main(): Promise<void> {
  if (rounds === 0) {
    await whileLocked(path, 'path', async () => {
      process.stdout.write('held\n')
      await setTimeout(60_000)
    })
  }
  for (let round = 0; round < rounds;) {
    try {
      await whileLocked(path, 'path', async () => {
        await writeFile(`${path}.inside`, '', { flag: 'wx' }) // fails while another process is inside
        await setTimeout(1)
        await rm(`${path}.inside`)
      })
      round++
    } catch (error) {
      if (codeOf(error) !== 'ERR_COUPLET_BUSY') throw error
      await setTimeout(1)
    }
  }
}

void main().catch((error: unknown) => {
  console.error(error)
  process.exitCode = 1
})
