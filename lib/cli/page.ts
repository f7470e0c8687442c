import { access, constants } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { writeAtomically } from '../files'
import { loadDrawing } from '../inspect/draw'

/** Says what would keep a page from being written before the work, not after. */
export async function checkPage(out: string): Promise<void> {
  await loadDrawing()
  await access(dirname(resolve(out)), constants.W_OK)
}

export function writePage(out: string, page: string): Promise<void> {
  return writeAtomically(resolve(out), [Buffer.from(page)])
}
