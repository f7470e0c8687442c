/** Files that nobody ever sees half written. */
import { randomBytes } from 'node:crypto'
import type { FileHandle } from 'node:fs/promises'
import { open, rename, rm } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'

/** Another name in the folder of `path`, for a file that is renamed when it is whole. */
export function partialPath(path: string): string {
  return join(dirname(path), `.${basename(path)}.${process.pid}.${randomBytes(6).toString('hex')}.partial`)
}

/** Writes pieces one after another: whoever opens `path` sees the old file or the new one, and a crash leaves the old. */
export async function writeAtomically(path: string, pieces: Iterable<Uint8Array>): Promise<void> {
  const partial = partialPath(path)
  const file = await open(partial, 'wx')
  try {
    await closing(file, async () => {
      for (const piece of pieces) await file.writeFile(piece)
      await file.sync()
    })
    await rename(partial, path)
  } catch (error) {
    await rm(partial, { force: true })
    throw error
  }
  const folder = await open(dirname(path), 'r')
  await closing(folder, () => folder.sync()) // the new name is on the disk as well
}

async function closing(file: FileHandle, use: () => Promise<void>): Promise<void> {
  try {
    await use()
  } finally {
    await file.close()
  }
}
