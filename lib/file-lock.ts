/** One process at a time for what lies at a path, said by a file beside it. What a killed process leaves is taken over. */
import { readFile, rename, rm, writeFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { resolve } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { CoupletError, codeOf } from './errors'
import { partialPath } from './files'

/** The file's JSON. */
interface Owner {
  pid: number
  host: string
  /** When the process began, in clock ticks since the system did: a pid is used again. null: not known. */
  started: string | null
}

/**
 * Does `work` while `<path>.lock` says that this process uses the path; its folder has to be there.
 * @param name of the argument that said `path`
 * @throws {CoupletError} `ERR_COUPLET_BUSY` while the process that made such a file runs, or where nobody can tell, saying what to do
 */
export async function whileLocked<Result>(path: string, name: string, work: () => Promise<Result>): Promise<Result> {
  const file = `${resolve(path)}.lock`
  const own = JSON.stringify({ pid: process.pid, host: hostname(), started: await startOf(process.pid) } satisfies Owner)
  while (!await isMade(file, own)) {
    const text = await readOwner(file)
    if (text === undefined) continue
    const owner = ownerOf(text)
    if (owner !== undefined && await mayRun(owner)) throw busy(path, name, file, owner)
    await removeStale(file, text)
  }
  try {
    return await work()
  } finally {
    await rm(file, { force: true })
  }
}

/** The same, but nothing where another process has the path. */
export async function unlessLocked(path: string, name: string, work: () => Promise<void>): Promise<void> {
  await whileLocked(path, name, work).catch((error: unknown) => {
    if (codeOf(error) !== 'ERR_COUPLET_BUSY') throw error
  })
}

async function isMade(file: string, text: string): Promise<boolean> {
  try {
    await writeFile(file, text, { flag: 'wx' })
    return true
  } catch (error) {
    if (codeOf(error) !== 'EEXIST') throw error
    return false
  }
}

/** undefined: gone by now. Whoever makes a file writes it at once: what is still empty after a while was left so. */
async function readOwner(file: string): Promise<string | undefined> {
  for (let attempt = 0; ; attempt++) {
    const text = await readFile(file, 'utf8').catch((error: unknown) => {
      if (codeOf(error) !== 'ENOENT') throw error
      return undefined
    })
    if (text === undefined || ownerOf(text) !== undefined || attempt === 10) return text
    await setTimeout(20)
  }
}

function ownerOf(text: string): Owner | undefined {
  try {
    const { pid, host, started } = JSON.parse(text) as Partial<Owner>
    return Number.isInteger(pid) && typeof host === 'string' ? { pid: pid!, host, started: started ?? null } : undefined
  } catch {
    return undefined
  }
}

/** Of another host nobody can tell. */
async function mayRun({ pid, host, started }: Owner): Promise<boolean> {
  if (host !== hostname()) return true
  try {
    process.kill(pid, 0)
  } catch (error) {
    if (codeOf(error) === 'ESRCH') return false
  }
  const now = await startOf(pid)
  return started === null || now === null || now === started
}

/** Field 22 of /proc/<pid>/stat, the 20th after the name, which may have spaces; null on systems without it. */
async function startOf(pid: number): Promise<string | null> {
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '')
  return text.slice(text.lastIndexOf(')') + 2).split(' ')[19] ?? null
}

/** Moved away before it is removed: of several processes that find it stale one gets it, and what a faster one has made since is put back. */
async function removeStale(file: string, text: string): Promise<void> {
  const aside = partialPath(file)
  try {
    await rename(file, aside)
  } catch (error) {
    if (codeOf(error) === 'ENOENT') return
    throw error
  }
  if (await readFile(aside, 'utf8') === text) await rm(aside)
  else await rename(aside, file)
}

function busy(path: string, name: string, file: string, { pid, host }: Owner): CoupletError {
  return new CoupletError('ERR_COUPLET_BUSY', `Expected a path that no other process uses for \`${name}\` but received "${path}", `
    + `which process ${pid} of host "${host}" uses: wait until it has ended, or give another path; if it has ended, remove "${file}"`)
}
