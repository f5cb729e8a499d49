/** The same package for ESM: one copy of it in a process, whoever imports it how. */
export { attach, Keyring, LOOKUP_BUCKETS, metrics, ResumedError } from "./index.js";
export type { Logger, Options, Installation, Stats, Tls } from "./index.js";
