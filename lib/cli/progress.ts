import { SingleBar } from 'cli-progress'

/** One progress bar on standard error, with the time left; plain lines every few seconds where there is no terminal. */
export class Progress {
  #bar: SingleBar | undefined
  #title = ''

  update(title: string, done: number, total: number): void {
    if (title !== this.#title || !this.#bar) {
      this.stop()
      this.#title = title
      this.#bar = new SingleBar({
        format: `${title.padEnd(24)} {bar} {percentage} % | {eta_formatted} left`,
        barCompleteChar: '█',
        barIncompleteChar: '░',
        barsize: 30,
        hideCursor: true,
        etaBuffer: 50,
        noTTYOutput: true,
        notTTYSchedule: 5000,
        stream: process.stderr,
      })
      this.#bar.start(total, done)
    }
    this.#bar.update(done)
  }

  stop(): void {
    this.#bar?.stop()
    this.#bar = undefined
  }
}
