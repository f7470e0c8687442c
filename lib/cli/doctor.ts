import { Command } from 'commander'
import { type BackendState, capabilities } from '../capabilities'
import { addon } from '../native/addon'
import { openOnnxruntime } from '../onnx/library'
import { reasonAgainstCuda } from '../onnx/provider'

type State = { available: true } | { available: false; reason: string }
type Found = { available: true; version: string; library: string; cuda: State } | { available: false; reason: string }

export function doctorCommand(): Command {
  return new Command('doctor')
    .description('say what is loaded, which backends and devices are here and why one is not')
    .option('--json', 'print one JSON object')
    .action((flags: { json?: boolean }) => {
      const found = { ...capabilities(), onnxruntime: findOnnxruntime() }
      if (flags.json) {
        console.log(JSON.stringify(found, null, 2))
        return
      }
      const row = (name: string, value: string) => { console.log(`${name.padEnd(14)} ${value}`) }
      row('couplet', `${found.version} (ABI ${found.abi}, packed layout ${found.layout})`)
      row('node', `${process.version} ${process.platform}-${process.arch}, ${found.cores} cores`)
      for (const [name, backend] of Object.entries(found.backends)) {
        for (const [line, text] of linesOf(backend).entries()) row(line === 0 ? name : '', text)
      }
      const { onnxruntime } = found
      row('onnxruntime', onnxruntime.available ? `${onnxruntime.version} (${onnxruntime.library})` : `not available: ${onnxruntime.reason}`)
      if (onnxruntime.available) row('', `CUDA execution provider: ${onnxruntime.cuda.available ? 'available' : `not available: ${onnxruntime.cuda.reason}`}`)
    })
}

/** A backend, and each of its devices. */
export function linesOf(backend: BackendState): string[] {
  if (!backend.available) return [`not available: ${backend.reason}`]
  const { variant, driver, runtime, devices } = backend
  const versions = [driver && `driver for CUDA ${driver}`, runtime && `built with CUDA ${runtime}`].filter(Boolean)
  const unit = driver === undefined ? 'cores' : 'multiprocessors'
  return [
    ['available', variant, ...versions].join(', '),
    ...devices.map((device) => 'reason' in device
      ? `device ${device.index}: not usable: ${device.reason}`
      : `device ${device.index}: ${device.name}, ${device.architecture}, ${device.multiprocessors} ${unit}, ` +
        `${gibibytes(device.freeBytes)} of ${gibibytes(device.memoryBytes)} GiB free`),
  ]
}

function gibibytes(bytes: number): string {
  return (bytes / 2 ** 30).toFixed(1)
}

function findOnnxruntime(): Found {
  try {
    const { version, library } = openOnnxruntime()
    return { available: true, version, library, cuda: cudaOf(library) }
  } catch (error) {
    return { available: false, reason: (error as Error).message }
  }
}

function cudaOf(library: string): State {
  const reason = reasonAgainstCuda(library)
  if (reason !== undefined) return { available: false, reason }
  try {
    addon().checkCudaProvider({ library, deviceIndex: 0 })
    return { available: true }
  } catch (error) {
    return { available: false, reason: (error as Error).message }
  }
}
