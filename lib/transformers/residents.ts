import type { Sequence } from '../cache'
import { TokenList } from './tokens'

/** A resident sequence is rolled back in place when at most this many of its tokens are lost by it; else it is forked. */
const ROLLBACK_TOKENS = 32
/** A shorter common prefix is run again: that costs less than a fork. */
const FORK_TOKENS = 16

/** One call of generate(). Sequences it works on are its own until it ends. */
export type Call = object

/** A sequence of the cache together with the text it holds. */
export class Resident {
  readonly sequence: Sequence
  text: TokenList
  /** The generate() call that is at work on this sequence, if any: others may fork it, nothing else. */
  owner: Call | undefined
  /** Chosen for a row of the step that is being put together. */
  reserved = false
  /** Inside a step that is running: not to be touched at all. */
  running = false
  /** Counts up with every use; the smallest one is evicted first. */
  lastUse = 0

  constructor(sequence: Sequence, text: TokenList) {
    this.sequence = sequence
    this.text = text
  }
}

/** What became of the texts that steps asked for. */
export interface ReuseCounts {
  forks: number
  rollbacks: number
  evictions: number
}

/**
 * The sequences that outlive the steps and calls which made them, found again by their text. Evicted least recently used:
 * whatever is evicted is run again when its text comes back.
 */
export class Residents {
  readonly counts: ReuseCounts = { forks: 0, rollbacks: 0, evictions: 0 }
  readonly #create: () => Sequence
  readonly #limit: number
  readonly #all = new Set<Resident>()
  #clock = 0

  constructor(create: () => Sequence, limit: number) {
    this.#create = create
    this.#limit = limit
  }

  get size(): number {
    return this.#all.size
  }

  /**
   * A resident whose text is a prefix of `text`, at most `reusable` tokens long: the longest that can be had. It is reserved
   * until `release`.
   */
  acquire(text: TokenList, reusable: number, call: Call | undefined): Resident {
    const resident = this.#reuse(text, reusable, call) ?? this.#add(this.#create(), TokenList.of())
    resident.reserved = true
    resident.owner = call
    resident.lastUse = ++this.#clock
    return resident
  }

  /** Ends the reservation of a step's residents. */
  release(residents: readonly Resident[]): void {
    for (const resident of residents) {
      resident.reserved = false
      resident.running = false
      if (resident.text.length === 0) this.drop(resident)
    }
    while (this.#all.size > this.#limit && this.evict());
  }

  /** The call is over: its residents are anybody's. */
  end(call: Call): void {
    for (const resident of this.#all) if (resident.owner === call) resident.owner = undefined
    this.release([])
  }

  /** Drops the least recently used resident that nobody works on. False when there is none. */
  evict(): boolean {
    let oldest: Resident | undefined
    for (const resident of this.#all) {
      if (resident.reserved || resident.running || resident.owner) continue
      if (!oldest || resident.lastUse < oldest.lastUse) oldest = resident
    }
    if (!oldest) return false
    this.drop(oldest)
    this.counts.evictions += 1
    return true
  }

  drop(resident: Resident): void {
    this.#all.delete(resident)
    resident.sequence.dispose()
  }

  clear(): void {
    for (const resident of [...this.#all]) this.drop(resident)
  }

  #reuse(text: TokenList, reusable: number, call: Call | undefined): Resident | undefined {
    let best: Resident | undefined
    let shared = 0
    let lost = 0
    for (const resident of this.#all) {
      if (resident.running) continue
      const common = Math.min(resident.text.commonPrefix(text), reusable)
      // What taking it over would cost; of two that share as much, the cheaper one.
      const free = !resident.reserved && (resident.owner === undefined || resident.owner === call)
      const cost = free ? resident.text.length - common : Infinity
      if (common > shared || (best && common === shared && cost < lost)) {
        best = resident
        shared = common
        lost = cost
      }
    }
    if (!best) return undefined
    if (lost <= Math.min(ROLLBACK_TOKENS, shared)) {
      if (lost > 0) {
        best.sequence.truncate(shared)
        best.text = text.prefix(shared)
        this.counts.rollbacks += 1
      }
      return best
    }
    if (shared < FORK_TOKENS) return undefined
    best.lastUse = ++this.#clock
    const fork = this.#add(best.sequence.fork(), text.prefix(shared))
    if (best.text.length > shared) fork.sequence.truncate(shared)
    this.counts.forks += 1
    return fork
  }

  #add(sequence: Sequence, text: TokenList): Resident {
    const resident = new Resident(sequence, text)
    this.#all.add(resident)
    return resident
  }
}
