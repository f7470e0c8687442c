// `npm test`: everything from a clean clone to one line of counts. Sets up, builds, type-checks, then runs the native test
// programs and mocha. Arguments go to mocha (`npm test -- --grep kmeans`).
import { mochaTests, summary } from './mocha.mjs'
import { nativeTests } from './native-tests.mjs'
import { installDependencies, step } from './setup.mjs'

installDependencies()
const native = await nativeTests()
step('type-checking lib, test and bench', process.execPath, ['node_modules/typescript/bin/tsc', '-p', '.'])
step('compiling lib/ to dist/', process.execPath, ['scripts/build-lib.mjs'])
console.log('\n> mocha')
const mocha = mochaTests(process.argv.slice(2))

const total = { passed: native.passed + mocha.passed, failed: native.failed + mocha.failed, skipped: mocha.skipped }
console.log(summary(total))
process.exitCode = total.failed > 0 ? 1 : 0
