import tseslint from "typescript-eslint";

export default tseslint.config(
    { ignores: ["dist", ".build", "src/v1", "**/*.{cjs,mjs}"] },
    ...tseslint.configs.strictTypeChecked,
    ...tseslint.configs.stylisticTypeChecked,
    {
        languageOptions: { parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname } },
        rules: {
            "@typescript-eslint/restrict-template-expressions": ["error", { allowNumber: true }],
            "@typescript-eslint/no-floating-promises": [
                "error",
                { allowForKnownSafeCalls: [{ from: "package", package: "node:test", name: "test" }] },
            ],
        },
        linterOptions: { reportUnusedDisableDirectives: "error" },
    },
);
