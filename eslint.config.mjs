import ts from 'typescript-eslint'

// The layout rules are eslint's own: deprecated, kept while they do all that this code base asks of a formatter.
const layout = {
  semi: ['error', 'never'],
  quotes: ['error', 'single', { avoidEscape: true }],
  indent: ['error', 2, { SwitchCase: 1, ignoredNodes: ['ConditionalExpression *', 'TemplateLiteral *', 'TSUnionType *', 'TSIntersectionType *'] }],
  'max-len': ['error', { code: 160, ignoreUrls: true, ignoreTemplateLiterals: true }],
  'no-trailing-spaces': 'error',
  'eol-last': 'error',
}

export default ts.config(
  { ignores: ['dist/', 'build/', 'build-*/', 'prebuilds/', 'coverage/', 'docs/', 'models/'] },
  {
    files: ['**/*.ts'],
    extends: [ts.configs.recommendedTypeChecked],
    languageOptions: { parserOptions: { project: './tsconfig.json', tsconfigRootDir: import.meta.dirname } },
    rules: {
      ...layout,
      eqeqeq: 'error',
      'no-console': ['error'],
      '@typescript-eslint/no-explicit-any': 'error',
      '@typescript-eslint/consistent-type-imports': 'error',
      '@typescript-eslint/switch-exhaustiveness-check': 'error',
      '@typescript-eslint/prefer-readonly': 'error',
      '@typescript-eslint/no-unnecessary-condition': ['error', { allowConstantLoopConditions: true }],
      '@typescript-eslint/explicit-module-boundary-types': 'error',
      '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_' }],
    },
  },
  // mocha's describe and it take promises and empty bodies in stride; tests may hand over what the types forbid.
  {
    files: ['test/**/*.ts', 'bench/**/*.ts'],
    rules: {
      'no-console': 'off',
      '@typescript-eslint/no-unnecessary-condition': 'off',
      '@typescript-eslint/explicit-module-boundary-types': 'off',
    },
  },
  { files: ['lib/cli/**/*.ts'], rules: { 'no-console': 'off' } },
  { files: ['**/*.mjs'], rules: layout },
)
