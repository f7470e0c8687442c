/**
 * The state of a calibration as a folder, from which it goes on as if it had not been interrupted: state.json says what the others
 * hold. Samples are written in place, but a slot's last writer is decided by the text alone, so chunks that are run once more
 * leave the same; tables and state.json appear whole or not at all.
 */
import { mkdir, open, readdir, readFile, rm, rmdir } from 'node:fs/promises'
import { constants } from 'node:fs'
import { dirname, join, resolve } from 'node:path'

import { requireText } from '../arguments'
import { codeOf, rangeError } from '../errors'
import { unlessLocked, whileLocked } from '../file-lock'
import { writeAtomically } from '../files'
import type { Side } from '../gradient/attention'
import type { Chosen } from '../allocate/choose'
import type { CaptureCheckpoint, CaptureState, CaptureStores } from './capture'
import type { SamplePart, SampleStore, SlotRun } from './sample'
import { partName } from './sample'

/** What a calibration is told; a checkpoint belongs to one set of these. */
export type CalibrationSettings = Record<string, string | number>

/** What was chosen for a budget. */
export type ChosenCodecs = Pick<Chosen, 'codecs' | 'chosen'>

const format = 'couplet.calibration'
const stateFile = 'state.json'
const chosenFile = 'chosen.json'
const ownFiles = /^(state\.json|(sample|heldOut)\.layers\.\d+\.(key|value)\.(rows|weights)|layers\.\d+\.(key|value)\.table|chosen\.json)$/

/** Least time between two savings of the text's state: each waits for the disk. */
const saveMilliseconds = 2000

export class CalibrationCheckpoint implements CaptureCheckpoint, CaptureStores {
  readonly sample: FileStore
  readonly heldOut: FileStore
  readonly #folder: string
  readonly #settings: CalibrationSettings
  #capture: CaptureState | undefined
  #saved = -Infinity

  private constructor(folder: string, settings: CalibrationSettings, capture: CaptureState | undefined) {
    this.#folder = folder
    this.#settings = settings
    this.#capture = capture
    this.sample = new FileStore(folder, 'sample.')
    this.heldOut = new FileStore(folder, 'heldOut.')
  }

  /**
   * Opens or makes the folder.
   * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a folder that holds something else, or the state of other settings, naming them
   */
  static async open(folder: string, settings: CalibrationSettings): Promise<CalibrationCheckpoint> {
    await mkdir(folder, { recursive: true })
    const text = await readFile(join(folder, stateFile), 'utf8').catch((error: unknown) => {
      if (codeOf(error) !== 'ENOENT') throw error
      return undefined
    })
    if (text === undefined) {
      if ((await readdir(folder)).length > 0) throw unsuitable(folder, `it has files, and no ${stateFile} among them`)
      const checkpoint = new CalibrationCheckpoint(folder, settings, undefined)
      await checkpoint.#writeState()
      return checkpoint
    }
    const known = parseState(folder, text)
    const other = Object.keys({ ...known.settings, ...settings }).filter((name) => known.settings[name] !== settings[name])
    if (other.length > 0) throw unsuitable(folder, other.map((name) => `${name} was ${known.settings[name] ?? 'not there'} and is ${settings[name] ?? 'not there'}`).join(', '))
    return new CalibrationCheckpoint(folder, settings, known.capture)
  }

  get state(): CaptureState | undefined {
    return this.#capture
  }

  /** @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT`: always. */
  refuseText(): never {
    throw unsuitable(this.#folder, 'it is of another text')
  }

  /** Saves now and then, and at the end. */
  async save(state: CaptureState): Promise<void> {
    if (!state.whole && performance.now() - this.#saved < saveMilliseconds) return
    this.#capture = state
    await this.sample.flush()
    await this.heldOut.flush()
    await this.#writeState()
    this.#saved = performance.now()
  }

  async saveChosen({ codecs, chosen }: ChosenCodecs): Promise<void> {
    await writeAtomically(join(this.#folder, chosenFile), [new TextEncoder().encode(JSON.stringify({ codecs, chosen }))])
  }

  /** What was chosen for the same settings, if it was. */
  async readChosen(): Promise<ChosenCodecs | undefined> {
    const text = await readFile(join(this.#folder, chosenFile), 'utf8').catch((error: unknown) => {
      if (codeOf(error) !== 'ENOENT') throw error
      return undefined
    })
    return text === undefined ? undefined : JSON.parse(text) as ChosenCodecs
  }

  async saveTable(layer: number, side: Side, table: Float32Array): Promise<void> {
    await writeAtomically(this.#tablePath(layer, side), [new Uint8Array(table.buffer, table.byteOffset, table.byteLength)])
  }

  /** The table of a layer and side, if it has been learned. */
  async readTable(layer: number, side: Side, length: number): Promise<Float32Array | undefined> {
    const bytes = await readFile(this.#tablePath(layer, side)).catch((error: unknown) => {
      if (codeOf(error) !== 'ENOENT') throw error
      return undefined
    })
    if (bytes === undefined) return undefined
    const table = new Float32Array(length)
    if (bytes.length !== table.byteLength) throw unsuitable(this.#folder, `the table of layer ${layer}, ${side}s, has ${bytes.length} bytes and not ${table.byteLength}`)
    new Uint8Array(table.buffer).set(bytes)
    return table
  }

  #tablePath(layer: number, side: Side): string {
    return join(this.#folder, `layers.${layer}.${side}.table`)
  }

  async #writeState(): Promise<void> {
    const json = JSON.stringify({ format, settings: this.#settings, ...(this.#capture && { capture: this.#capture }) })
    await writeAtomically(join(this.#folder, stateFile), [new TextEncoder().encode(json)])
  }
}

/** Does what uses the folder, and those beside it that the recipe `best` makes, while no other process does. */
export async function whileCheckpointLocked<Result>(folder: string, work: () => Promise<Result>): Promise<Result> {
  requireText(folder, 'checkpoint')
  await mkdir(dirname(resolve(folder)), { recursive: true })
  return whileLocked(folder, 'checkpoint', work)
}

/** Removes what a calibration has left, unless another has begun with it since. */
export async function removeCheckpoints(folder: string): Promise<void> {
  await unlessLocked(folder, 'checkpoint', async () => {
    for (const place of [folder, `${folder}.fisher`, `${folder}.attention`]) {
      await removeCheckpoint(place)
      await rm(`${place}.tune`, { force: true })
    }
  })
}

/** Removes a checkpoint and nothing else that may lie in its folder. */
export async function removeCheckpoint(folder: string): Promise<void> {
  const names = await readdir(folder).catch(() => [])
  // The state goes last: a folder that a crash leaves half empty is still known as a checkpoint.
  const own = names.filter((name) => ownFiles.test(name)).sort((a, b) => Number(a === stateFile) - Number(b === stateFile))
  for (const name of own) await rm(join(folder, name))
  if (own.length === names.length) await rmdir(folder).catch(() => undefined)
}

/** A sample in files, one for each layer, side and kind: float32 [slots][width]. Its memory is that of what is read or written. */
export class FileStore implements SampleStore {
  readonly #folder: string
  readonly #prefix: string
  readonly #written = new Set<string>()

  constructor(folder: string, prefix: string) {
    this.#folder = folder
    this.#prefix = prefix
  }

  async write(part: SamplePart, width: number, runs: readonly SlotRun[]): Promise<void> {
    const path = this.#path(part)
    await using file = await open(path, constants.O_WRONLY | constants.O_CREAT)
    for (const { slot, data } of runs) {
      const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
      for (let done = 0; done < bytes.length;) done += (await file.write(bytes, done, bytes.length - done, slot * width * 4 + done)).bytesWritten
    }
    this.#written.add(path)
  }

  async read(part: SamplePart, width: number, slots: number): Promise<Float32Array> {
    const data = new Float32Array(slots * width)
    const bytes = new Uint8Array(data.buffer)
    await using file = await open(this.#path(part))
    for (let done = 0; done < bytes.length;) {
      const { bytesRead } = await file.read(bytes, done, Math.min(bytes.length - done, 2 ** 30), done)
      if (bytesRead === 0) throw unsuitable(this.#folder, `"${this.#prefix}${partName(part)}" has ${done} bytes and not ${bytes.length}`)
      done += bytesRead
    }
    return data
  }

  /** Waits until the disk has what was written. */
  async flush(): Promise<void> {
    for (const path of this.#written) {
      await using file = await open(path, 'r+')
      await file.datasync()
    }
    this.#written.clear()
  }

  dispose(): void {}

  #path(part: SamplePart): string {
    return join(this.#folder, this.#prefix + partName(part))
  }
}

function parseState(folder: string, text: string): { settings: CalibrationSettings; capture?: CaptureState } {
  let state: unknown
  try {
    state = JSON.parse(text)
  } catch {
    throw unsuitable(folder, `its ${stateFile} is not JSON`)
  }
  if (typeof state !== 'object' || state === null || !('format' in state) || state.format !== format || !('settings' in state))
    throw unsuitable(folder, `its ${stateFile} has no "format" that is "${format}"`)
  return state as { settings: CalibrationSettings; capture?: CaptureState }
}

function unsuitable(folder: string, why: string): RangeError {
  return rangeError(`Expected a checkpoint of this calibration for \`checkpoint\` but received "${folder}": ${why}`)
}
