import { Command } from 'commander'
import { capabilities } from '../capabilities'
import { openOnnxruntime } from '../onnx/library'

type Found = { available: true; version: string; library: string } | { available: false; reason: string }

export function doctorCommand(): Command {
  return new Command('doctor')
    .description('say what is loaded, which backends run here and why one does not')
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
        row(name, backend.available ? `available, ${backend.variant}` : `not available: ${backend.reason}`)
      }
      const { onnxruntime } = found
      row('onnxruntime', onnxruntime.available ? `${onnxruntime.version} (${onnxruntime.library})` : `not available: ${onnxruntime.reason}`)
    })
}

function findOnnxruntime(): Found {
  try {
    const { version, library } = openOnnxruntime()
    return { available: true, version, library }
  } catch (error) {
    return { available: false, reason: (error as Error).message }
  }
}
