/** Files that a command writes: what would keep it from writing them is said before the work, not after hours of it. */
import { access, constants, stat } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { writeAtomically } from '../files'
import { loadDrawing } from '../inspect/draw'

export async function checkOutput(out: string): Promise<void> {
  const path = resolve(out)
  const found = await stat(path).catch(() => undefined)
  if (found?.isDirectory()) throw new Error(`${out} is a folder: name a file in it`)
  await access(dirname(path), constants.W_OK)
}

export async function checkPage(out: string): Promise<void> {
  await loadDrawing()
  await checkOutput(out)
}

export function writePage(out: string, page: string): Promise<void> {
  return writeAtomically(resolve(out), [Buffer.from(page)])
}
