// mocha's spec reporter, which also writes its counts to the file that COUPLET_TEST_COUNTS names.
const { writeFileSync } = require('node:fs')
const { reporters, Runner } = require('mocha')

module.exports = class extends reporters.Spec {
  constructor(runner, options) {
    super(runner, options)
    const file = process.env.COUPLET_TEST_COUNTS
    if (!file) return
    runner.once(Runner.constants.EVENT_RUN_END, () => {
      const { passes: passed, failures: failed, pending: skipped } = runner.stats
      writeFileSync(file, JSON.stringify({ passed, failed, skipped }))
    })
  }
}
