// Stands before nvcc (CMAKE_CUDA_COMPILER_LAUNCHER) and keeps what ptxas says of a file's kernels beside its object: ninja
// compiles a file once, and kernel-table.mjs may read that any number of times.
import { spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'

const [command, ...argv] = process.argv.slice(2)
const { status, stderr, error } = spawnSync(command, argv, { stdio: ['inherit', 'inherit', 'pipe'], encoding: 'utf8' })
if (error) throw error
const spoken = stderr.split('\n').filter((line) => !/^ptxas info|^\s+\d+ bytes stack frame/.test(line)).join('\n')
if (spoken.trim()) process.stderr.write(spoken)
const output = argv[argv.indexOf('-o') + 1]
if (status === 0 && argv.includes('-c')) writeFileSync(`${output}.ptxas`, stderr)
process.exitCode = status ?? 1
