import { Command, CommanderError } from 'commander'
import { packageVersion } from '../native/addon'
import { calibrateCommand } from './calibrate'
import { doctorCommand } from './doctor'
import { evaluateCommand } from './evaluate'
import { generateCommand } from './generate'
import { inspectCommand } from './inspect'
import { planCommand } from './plan'
import { tuneCommand } from './tune'

const outputClosed = new Error('nobody reads the output any more')

/**
 * Runs the `couplet` command.
 *
 * @param argv - arguments after the program's name
 * @returns exit code: 0 done, 1 failed or cancelled, 2 usage
 */
export async function main(argv: readonly string[]): Promise<number> {
  const cancel = new AbortController()
  const onInterrupt = () => { cancel.abort() }
  process.once('SIGINT', onInterrupt)
  process.stdout.on('error', (error: NodeJS.ErrnoException) => { // may come after main has returned
    cancel.abort(outputClosed)
    if (error.code === 'EPIPE') return // `couplet generate | head`: the reader has what it wants
    console.error(`couplet: the output cannot be written: ${error.message}`)
    process.exitCode = 1
  })
  const program = new Command('couplet')
    .description('KV caches of language models at 4 down to 1 bit per channel')
    .version(packageVersion)
    .showHelpAfterError('(couplet --help shows what there is)')
  const { signal } = cancel
  const commands = [
    calibrateCommand(signal), tuneCommand(signal), evaluateCommand(signal), generateCommand(signal), inspectCommand(signal), planCommand(),
    doctorCommand(),
  ]
  for (const command of commands) {
    program.addCommand(command.copyInheritedSettings(program))
  }
  for (const command of [program, ...program.commands]) command.exitOverride()
  try {
    await program.parseAsync(argv, { from: 'user' })
    return 0
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2
    if (cancel.signal.reason === outputClosed) return 0
    if (cancel.signal.aborted) {
      console.error('couplet: cancelled')
      return 1
    }
    const { message, code } = error as Error & { code?: string }
    console.error(`couplet: ${message}${code === undefined ? '' : ` (${code})`}`)
    return 1
  } finally {
    process.removeListener('SIGINT', onInterrupt)
  }
}
