// `npm run check`: all that CI asks besides tests. Warnings are errors in the C++ build, so building is one of the checks.
import { installDependencies, step } from './setup.mjs'

installDependencies()
const node = process.execPath
step('layout and lint', node, ['scripts/format.mjs', '--check'])
step('types', node, ['node_modules/typescript/bin/tsc', '-p', '.'])
step('the addon, without warnings', node, ['scripts/build.mjs', '--', '-DCOUPLET_WERROR=ON'])
step('the kernels by nvcc, without warnings and spills; docs/kernels.md', node, ['scripts/kernel-table.mjs', '--check'])
step('dist/', node, ['scripts/build-lib.mjs'])
step('publint: package.json says what is there', node, ['node_modules/publint/src/cli.js', '--strict'])
// Every resolution that Node >= 20 and bundlers use; TypeScript's node10 knows no exports map.
step('attw: types agree with the modules', node, ['node_modules/@arethetypeswrong/cli/dist/index.js', '--pack', '.', '--profile', 'node16'])
step('docs/reference is current', node, ['scripts/reference.mjs', '--check'])
console.log('\nall checks passed')
