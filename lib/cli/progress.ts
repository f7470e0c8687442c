import { SingleBar } from 'cli-progress'

/** One progress bar on standard error, with the time left; plain lines every few seconds where there is no terminal. */
export class Progress {
  #bar: SingleBar | undefined
  #title = ''
  #start = { time: 0, done: 0 }

  /** `total`: undefined where nobody knows it. `note`: a word on what was reached so far. */
  update(title: string, done: number, total: number | undefined, note = ''): void {
    if (title !== this.#title || !this.#bar) {
      this.stop()
      this.#title = title
      this.#bar = new SingleBar({
        format: `${title.padEnd(24)} ${total === undefined ? '{value} done' : '{bar} {percentage} % | {left} left'} {note}`,
        barCompleteChar: '█',
        barIncompleteChar: '░',
        barsize: 30,
        hideCursor: true,
        noTTYOutput: true,
        notTTYSchedule: 5000,
        stream: process.stderr,
      })
      this.#start = { time: performance.now(), done }
      this.#bar.start(total ?? Infinity, done, { left: '?', note })
    }
    if (total !== undefined) this.#bar.setTotal(total)
    this.#bar.update(done, { left: this.#left(done, total ?? NaN), note })
  }

  /** By the mean speed since the start: that of the last steps, which cli-progress takes, jumps with every other load of the machine. */
  #left(done: number, total: number): string {
    const ran = done - this.#start.done
    if (ran <= 0) return '?'
    const seconds = Math.ceil(((performance.now() - this.#start.time) / 1000 / ran) * (total - done))
    return seconds < 60 ? `${seconds}s` : seconds < 3600 ? `${Math.floor(seconds / 60)}m${seconds % 60}s` : `${Math.floor(seconds / 3600)}h${Math.floor((seconds % 3600) / 60)}m`
  }

  stop(): void {
    this.#bar?.stop()
    this.#bar = undefined
  }
}
